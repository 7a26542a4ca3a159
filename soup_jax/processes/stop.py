"""SIGTERM and SIGINT become a request to stop, which the processes of a run agree on."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from soup_jax.processes.group import Solo


@contextlib.contextmanager
def stop_requests(group: Solo) -> Iterator[None]:
    """Inside the block both signals ask the group to stop; a second SIGINT kills as usual."""

    def handler(number: int, _: Any) -> None:
        group.request_stop(signal.Signals(number).name)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    try:
        old = {s: signal.signal(s, handler) for s in (signal.SIGTERM, signal.SIGINT)}
    except ValueError:  # not the main thread: somebody else's program, and its signals
        yield
        return
    try:
        yield
    finally:
        for number, previous in old.items():
            signal.signal(number, previous)
