"""How the C library treats memory that a program on the CPU frees; no jax in here.

glibc gives blocks of more than 32 MB back to the system when they are freed, and takes new ones,
filled with zeros page by page, the next time. A training step on a CPU does that with all its
temporary arrays: about a fifth of its CPU time (`benchmarks/base.py`, with and without
`--give_back`).
"""

import ctypes
import glob
import os
import sys

_ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/accel*", "/dev/vfio/[0-9]*", "/dev/kfd")
# From malloc.h: parameter -> value.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_SETTINGS = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1, _TOP_PAD: 64 << 20}


def keep_freed() -> bool:
    """Keep freed memory for the next step; to be called before jax starts threads.

    Nothing is done, and False returned, where another system or C library runs, where there is an
    accelerator (its host frees checkpoints, not steps) or where a MALLOC_ variable is set.
    """
    if not sys.platform.startswith("linux") or any(v.startswith("MALLOC_") for v in os.environ):
        return False
    if any(map(glob.glob, _ACCELERATORS)):
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return min(mallopt(name, value) for name, value in _SETTINGS.items()) == 1
