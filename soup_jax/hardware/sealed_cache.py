"""Entries of jax's compilation cache that end in a hash of themselves.

jax runs what it reads from its cache, and checks none of it: a flipped bit ends the process by a
signal at every start, or gives other numbers. An entry that a full disk cut short is kept for ever,
and stops all further ones. Here a damaged entry counts as missing, and is replaced.
"""

import hashlib
import logging
import pathlib

# No public interface of jax takes another cache.
from jax._src import compilation_cache
from jax._src.lru_cache import LRUCache

_log = logging.getLogger(__name__)

_SEAL_BYTES = hashlib.sha256().digest_size


def install() -> None:
    """Make jax keep entries so. Call it before anything is compiled."""
    compilation_cache.LRUCache = SealedCache  # type: ignore[misc]


class SealedCache(LRUCache):
    """A cache with a size limit, for any number of processes."""

    def get(self, key: str) -> bytes | None:
        """The value, None if there is none or it is damaged."""
        with self.lock.acquire(timeout=self.lock_timeout_secs):
            entry = super().get(key)
            if entry is None:
                return None
            value = entry[:-_SEAL_BYTES]
            if entry == _sealed(value):
                return value
            _log.warning(
                "%s is damaged, or of an earlier version: compiling it again", self._entry(key)
            )
            self._drop(key)
        return None

    def put(self, key: str, value: bytes) -> None:
        """Add a value; what a killed process or a full disk left half-made is removed first."""
        with self.lock.acquire(timeout=self.lock_timeout_secs):
            self.drop_incomplete()
            try:
                super().put(key, _sealed(value))
            except BaseException:
                self._drop(key)
                raise

    def drop_incomplete(self) -> None:
        """Remove entries without the file with their time of use, which is written last.

        jax fails at one of them whenever it looks for old entries. Hold the lock.
        """
        for entry in pathlib.Path(str(self.path)).glob("*-cache"):
            key = entry.name.removesuffix("-cache")
            if not self._entry(key, "-atime").exists():
                self._drop(key)

    def _drop(self, key: str) -> None:
        for suffix in ("-cache", "-atime"):
            self._entry(key, suffix).unlink(missing_ok=True)

    def _entry(self, key: str, suffix: str = "-cache") -> pathlib.Path:
        return pathlib.Path(str(self.path)) / f"{key}{suffix}"


def _sealed(value: bytes) -> bytes:
    return value + hashlib.sha256(value).digest()
