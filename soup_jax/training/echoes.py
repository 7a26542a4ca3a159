"""What libraries say of checkpoints that is no news, or is told in one sentence elsewhere."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def drop() -> None:
    """Keep it off the terminal, for as long as this process lives."""
    # Orbax warns of every folder that is opened for reading alone, as all commands but `train` do.
    logging.getLogger("absl").addFilter(
        lambda record: not str(record.msg).startswith("Given directory is read only")
    )
    # When a read fails, orbax leaves the others that are under way: Python then tells of their
    # coroutines and tasks, and tensorstore of a closed event loop, in tracebacks by the dozen.
    logging.getLogger("asyncio").addFilter(lambda r: "tensorstore_spec" not in r.getMessage())
    hook = sys.unraisablehook

    def others(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)
        left = "orbax" in getattr(code, "co_filename", "")
        if not left and str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    sys.unraisablehook = others
