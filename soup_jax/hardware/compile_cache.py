"""Compiled functions kept on disk between starts, and a log line of what compiling took.

Every command calls `enable`; a program of your own that calls the library may do the same. The
folder is ~/.cache/soup_jax/xla (or below XDG_CACHE_HOME). It has a folder for each kind of machine
and number of cores, which holds up to 4 GiB; an entry that is damaged is replaced. You may delete
it at any time. jax's own variables win:

    JAX_COMPILATION_CACHE_DIR=DIR          another folder, as it is, with no limit but your own
    JAX_ENABLE_COMPILATION_CACHE=false     no cache

What is in the folder is run: whoever may write there may run code as you. So a default folder that
is another user's, or that others may write, is not used; one that you choose is not looked at.
"""

import contextlib
import functools
import hashlib
import logging
import os
import pathlib
import platform
import re
import tempfile
import time
from typing import Any

import jax
import numpy as np

_log = logging.getLogger(__name__)

MAX_BYTES = 4 << 30
MIN_COMPILE_SECS = 0.1
# The variable that tells XLA on a CPU for how many threads it compiles; default: of this process.
NUM_THREADS = "PJRT_NPROC"
_HIT = "/jax/compilation_cache/cache_hits"
_hits = 0


def enable() -> pathlib.Path | None:
    """Turn the cache on, unless the user turned it off; returns its folder, None without one.

    Call it before anything is compiled. A folder that cannot be written is a warning.
    """
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECS)
    config: Any = jax.config  # whose options no type checker knows
    if not config.jax_enable_compilation_cache:
        return None
    if chosen := config.jax_compilation_cache_dir:
        # No size limit there: jax then wants a file beside each entry, which older ones lack.
        return pathlib.Path(chosen)
    folder = _default_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _check_owner(folder)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        _log.warning(
            "compiled functions are not kept: %s; JAX_COMPILATION_CACHE_DIR names another folder", e
        )
        return None
    with contextlib.suppress(ImportError):  # a jax whose internals are elsewhere: kept unchecked
        from soup_jax.hardware import sealed_cache

        sealed_cache.install()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", MAX_BYTES)
    return folder


def _check_owner(folder: pathlib.Path) -> None:
    found = folder.stat()
    if hasattr(os, "geteuid") and (found.st_uid != os.geteuid() or found.st_mode & 0o022):
        raise PermissionError(f"{folder} is another user's, or others may write there")


def _default_folder() -> pathlib.Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    # A home may be shared by machines of several kinds, and jax's key does not tell CPUs apart: it
    # would run instructions that this one lacks. Nor does it tell the number of threads, for which
    # XLA on a CPU cuts loops and so sums: bits would depend on who compiled first.
    return pathlib.Path(cache) / "soup_jax" / "xla" / f"{_machine()}-{_num_threads()}"


def _num_threads() -> str:
    if chosen := os.environ.get(NUM_THREADS):
        return chosen
    granted = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else ()
    return str(len(granted) or os.cpu_count() or 1)


def _machine() -> str:
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
        found = re.search(r"^(flags|Features)\s*:.*$", text, re.MULTILINE)
        cpu = found[0] if found else platform.processor()
    except OSError:
        cpu = platform.processor() or platform.node()
    return f"{platform.machine()}-{hashlib.sha256(cpu.encode()).hexdigest()[:12]}"


@functools.cache
def _listen() -> None:
    def count(event: str, **_: Any) -> None:
        global _hits
        _hits += event == _HIT

    jax.monitoring.register_event_listener(count)


class Bound:
    """A jitted function whose first argument is given. It is an argument of the program and no
    constant in it, so that runs which differ in its value alone share what is compiled."""

    def __init__(self, jitted: Any, value: np.generic, sharding: jax.sharding.Sharding):
        """`sharding` is that of the argument; its devices need not be present for `lower`."""
        self.jitted, self._value, self._sharding = jitted, value, sharding

    @functools.cached_property
    def _array(self) -> jax.Array:
        # No process asks the others, as device_put would; and it is meant, once.
        with jax.transfer_guard_host_to_device("allow"):
            return jax.make_array_from_callback(
                (), self._sharding, lambda _: np.asarray(self._value)
            )

    def __call__(self, *arguments: Any) -> Any:
        """Call it with the other arguments."""
        return self.jitted(self._array, *arguments)

    def lower(self, *arguments: Any) -> Any:
        """Lower it for them, as of a jitted function."""
        first = jax.ShapeDtypeStruct((), self._value.dtype, sharding=self._sharding)
        return self.jitted.lower(first, *arguments)

    def bind(self, compiled: Any) -> Any:
        """What `lower` and `compile` made, for the other arguments alone."""
        return functools.partial(compiled, self._array)


def compiled(name: str, jitted: Any, *arguments: Any) -> Any:
    """`jitted` compiled for the arguments, or read from the cache; logs which, and the seconds."""
    _listen()
    start, hits = time.perf_counter(), _hits
    lowered = jitted.lower(*arguments)
    traced = time.perf_counter()
    result = lowered.compile()
    _log.info(
        "%s: traced in %.1f s, %s in %.1f s",
        name,
        traced - start,
        "read from the cache" if _hits > hits else "compiled",
        time.perf_counter() - traced,
    )
    return jitted.bind(result) if isinstance(jitted, Bound) else result
