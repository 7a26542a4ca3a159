"""A process of `soup-jax sweep`: carries out commands of `soup-jax` one after another.

    python -m soup_jax.cli.sweep_worker CORES < requests > answers

Nobody starts it by hand. Its runs are those of the same commands in processes of their own; what
they share is what costs a process its start: imports, the devices, and compiled code.

    CORES      numbers with commas: the only cores to run on; empty: all
    request    {"commands": [[argument, ...], ...], "log": FILE, "needs": FOLDER,
               "config": TEXT}, on a line
    answer     the exit status of the first command that failed, or 0

A `train` that a signal stopped has saved and has status 0. The commands behind it are for a run
that has ended, so they wait for the folder of its last checkpoint, FOLDER. A config file is read
again for each point, and may have been edited since the sweep began: what it gives must be TEXT.
"""

import gc
import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from typing import Any

from soup_jax.cli import config_flag

_CRASHED = 70  # as in sweeps.pool


def main(argv: Sequence[str]) -> None:
    """Serve until stdin is closed."""
    if argv and argv[0]:
        os.sched_setaffinity(0, [int(core) for core in argv[0].split(",")])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # a library that prints is no answer
    requests: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    busy = threading.Event()
    threading.Thread(target=_listen, args=(requests, busy), daemon=True).start()
    while (request := requests.get()) is not None:
        status = _serve(request)
        busy.clear()
        print(status, file=answers, flush=True)


def _listen(requests: "queue.SimpleQueue[dict[str, Any] | None]", busy: threading.Event) -> None:
    for line in sys.stdin:
        busy.set()
        requests.put(json.loads(line))
    # The sweep is gone. What it is in the middle of, this process saves.
    requests.put(None)
    if busy.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _serve(request: dict[str, Any]) -> int:
    with open(request["log"], "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        with config_flag.expected(request["config"]):
            return _carry_out(request["commands"], request["needs"])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _carry_out(commands: Sequence[Sequence[str]], needs: str) -> int:
    from soup_jax.cli import main as cli

    try:
        for arguments in commands:
            if status := cli.run(arguments):
                return status
            if needs and not os.path.isdir(needs):
                return 0
        return 0
    except Exception:
        traceback.print_exc()
        return _CRASHED
    finally:
        _forget()


def _forget() -> None:
    # The functions of a run hold its network and constants, and jax holds the functions.
    import jax

    jax.clear_caches()
    gc.collect()


if __name__ == "__main__":
    main(sys.argv[1:])
