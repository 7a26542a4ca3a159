"""The words of the command that this process carries out, for the records of runs.

`sys.argv` does not tell: a worker of a sweep carries out one command after another, and the
arguments of somebody else's program, which may hold secrets, are none of ours.
"""

import contextlib
import contextvars
import os
import sys
from collections.abc import Iterator, Sequence

_words: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("_words", default=())


@contextlib.contextmanager
def carried_out(argv: Sequence[str]) -> Iterator[None]:
    """For the block, the command is `soup-jax` with these arguments."""
    token = _words.set(("soup-jax", *argv))
    try:
        yield
    finally:
        _words.reset(token)


def words() -> list[str]:
    """Of the command; in another program than `soup-jax` its name alone."""
    return list(_words.get()) or [os.path.basename((sys.argv or [""])[0])]
