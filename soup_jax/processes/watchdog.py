"""Ends a process that makes no progress, and leaves its stacks for whoever looks into it.

A collective that hangs does so in C++ and for ever: no exception, no signal handler, no time-out.
The watchdog watches `group.at(...)`, which the training loop calls as each step ends on its devices
and for each evaluation batch and save.

It is a thread, for the timer of `faulthandler` can tell no other process which one hangs. That
timer is the backstop, should the interpreter be stuck.
"""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from soup_jax.processes.group import STATUS_FAILED, Solo

# The first step is compiled on the way: minutes for large models on many devices.
COMPILE_SECS = 3600.0
# The last resort, if the interpreter itself is stuck and this module's thread with it.
_BACKSTOP_SECS = 60.0

_stacks: dict[str, Any] = {"path": None}


def dump_stacks() -> str:
    """Write the stacks of all threads to stderr and to the file of `watch`; returns its path."""
    sys.stderr.flush()
    with contextlib.suppress(Exception):  # pytest's stderr has no descriptor
        faulthandler.dump_traceback(file=sys.__stderr__ or 2, all_threads=True)
    path = _stacks["path"]
    if path is None:
        return ""
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as f:
        faulthandler.dump_traceback(file=f, all_threads=True)
    return str(path)


def leave(text: str, status: int, *, after: Callable[[], object] = lambda: None) -> None:
    """Print the error, wait for `after`, and end the process whatever its other threads do."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
    os.write(2, f"soup-jax: error: {text}\n".encode())
    after()
    os._exit(status)


@contextlib.contextmanager
def watch(
    group: Solo, workdir: pathlib.Path, *, limit: float, allowances: Mapping[str, float]
) -> Iterator[None]:
    """Inside the block, `limit` seconds without `group.at` end the process; 0: never.

    Args:
      workdir: gets stacks_<process>.txt.
      allowances: seconds on top of `limit`, by phase.
    """
    done = threading.Event()
    _stacks["path"] = workdir / f"stacks_{group.process_id}.txt"
    group.at("restoring")

    def run() -> None:
        while not done.wait(min(max(limit / 20, 0.05), 10.0)):
            allowed = limit + allowances.get(group.place["phase"], 0.0)
            idle = time.monotonic() - group.moved
            left = max(allowed - idle, 0.0) + _BACKSTOP_SECS
            with contextlib.suppress(Exception):  # a notebook's stderr may have no descriptor
                faulthandler.dump_traceback_later(left, exit=True, file=sys.__stderr__ or 2)
            if idle > allowed:
                _give_up(group, idle, allowed)

    thread = threading.Thread(target=run, name="soup_jax-watchdog", daemon=True)
    if limit:
        thread.start()
    try:
        yield
    finally:
        done.set()
        if limit:
            thread.join()
            faulthandler.cancel_dump_traceback_later()
        _stacks["path"] = None


def _give_up(group: Solo, idle: float, allowed: float) -> None:
    place = group.place
    path = dump_stacks()
    text = (
        f"process {group.process_id} made no progress for {idle:.0f} s in step {place['step']}, "
        f"{place['phase']} ({allowed:g} s allowed: distributed.step_timeout_secs); its stacks are "
        f"in {path}"
    )
    verdict = group.fail(text, cause="hang")
    leave(f"{text}\n{verdict}".rstrip(), STATUS_FAILED, after=group.wait_for_others)
