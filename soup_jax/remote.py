"""Object storage: files at gs:// and s3:// addresses, found, read, copied.

The only place that knows fsspec, whose drivers are extras: gcsfs for gs://, s3fs for s3://. They
find credentials, endpoints and regions as the tools of each cloud do (application default
credentials, STORAGE_EMULATOR_HOST; AWS_PROFILE, AWS_ENDPOINT_URL, instance roles ...).

What fails for the moment (a lost connection, 429, 5xx) is tried again with growing pauses, by the
drivers and then here, for half a minute (s3fs) or two (gcsfs); what fails for good is one sentence
that names the address.
"""

import contextlib
import functools
import io
import logging
import os
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

from soup_jax.errors import UnavailableError, UserError

EXTRAS = {"gs": "gcs", "s3": "s3"}
ATTEMPTS = 3
PAUSE = 1.0  # seconds before the second attempt
SILENCE = 60.0  # seconds without a byte after which gcsfs gives up; by itself it waits forever
BLOCK_BYTES = 8 << 20  # read at a time

# pathlib makes one slash of two, so one is enough; a drive has one letter.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")
_T = TypeVar("_T")


class Found(NamedTuple):
    """An object: its address, its bytes, and a tag that changes with its content."""

    address: str
    size: int
    tag: str


def scheme(path: str | os.PathLike) -> str:
    """The scheme of an address, "gs" of gs://bucket/x; "" for a path of a file system."""
    found = _ADDRESS.match(os.fspath(path))
    return found[1].lower() if found else ""


def spelled(path: str | os.PathLike) -> str:
    """An address as it is written, with the two slashes that pathlib makes one."""
    text = os.fspath(path)
    found = _ADDRESS.match(text)
    return f"{found[1].lower()}://{text[found.end() :]}" if found else text


def is_object(path: str | os.PathLike) -> bool:
    """Whether a path is an address that this module reads."""
    return scheme(path) in EXTRAS


def _is_news(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("Could not determine bucket type")


@functools.lru_cache(maxsize=8)
def _driver(name: str) -> Any:
    # gcsfs first asks of what kind a bucket is, and says at each access that it may not know.
    logging.getLogger("gcsfs").addFilter(_is_news)
    try:
        import fsspec

        more: dict[str, Any] = {}
        if name == "gs":
            import aiohttp

            silence = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE, sock_read=SILENCE)
            more["requests_timeout"] = silence
        return fsspec.filesystem(name, skip_instance_cache=True, **more)
    except ImportError as e:
        raise UserError(
            f"{name}:// needs another package: pip install 'soup_jax[{EXTRAS[name]}]'"
        ) from e


def _call(address: str, function: Callable[[Any, str], _T]) -> _T:
    """`function(driver, bucket/path)`, again if it fails for the moment.

    Raises:
      FileNotFoundError: nothing is there.
      UnavailableError: one sentence for what fails for good.
    """
    driver = _driver(scheme(address))
    path = spelled(address).partition("://")[2]
    for attempt in range(ATTEMPTS):
        try:
            return function(driver, path)
        except FileNotFoundError:
            raise
        except Exception as e:
            if reason := _for_good(e, address):
                raise UnavailableError(f"{spelled(address)}: {reason}") from e
            if attempt == ATTEMPTS - 1:
                raise UnavailableError(
                    f"{spelled(address)}: no answer after {ATTEMPTS} attempts: {_words(e)}"
                ) from e
            time.sleep(PAUSE * 2**attempt * random.uniform(0.5, 1))
    raise AssertionError


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    at: BaseException | None = error
    while at is not None and id(at) not in seen:
        seen.add(id(at))
        yield at
        at = at.__cause__ or at.__context__


def _words(error: BaseException) -> str:
    words = (str(error).splitlines() or [""])[0][:200]
    # Of an answer without a text, gcsfs says ", 503".
    return words if re.match(r"\w", words) else f"{type(error).__name__}{words}"


def _for_good(error: BaseException, address: str) -> str:
    # By name and number: the drivers have exception types of several libraries.
    for e in _chain(error):
        name, words = type(e).__name__, str(e)
        code = str(getattr(e, "code", "")) or ""
        status = getattr(e, "status", None) or code
        response = getattr(e, "response", None)
        if isinstance(response, dict):
            code = str(response.get("Error", {}).get("Code", ""))
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
        if name in ("NoCredentialsError", "DefaultCredentialsError", "PartialCredentialsError"):
            return f"no credentials were found ({_words(e)}); {_LOGIN[scheme(address)]}"
        if code in ("NoSuchBucket", "InvalidBucketName"):
            return "there is no such bucket"
        denied = words.startswith("Forbidden: ")  # an OSError without a number, of gcsfs
        if isinstance(e, PermissionError) or str(status) in ("401", "403") or denied:
            return f"permission denied ({_words(e)}); {_LOGIN[scheme(address)]}"
        if name in ("ParamValidationError", "NoRegionError", "ProfileNotFound"):
            return _words(e)
        if isinstance(e, ValueError | TypeError) and "bucket" in words.lower():
            return _words(e)
    return ""


_LOGIN = {
    "gs": "log in with `gcloud auth application-default login`, or set "
    "GOOGLE_APPLICATION_CREDENTIALS",
    "s3": "log in with `aws configure` or `aws sso login`, or set AWS_PROFILE",
}


# How tensorstore, by which orbax reads and writes arrays, spells what says nothing of an object.
_NO_ANSWER = re.compile(
    r"(?:UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED(?=.*All \d+ retry attempts failed)): "
    r"(?:.*(?=All \d+ retry))?(?P<words>[^\[]*)",
    re.DOTALL,
)
_DENIED = re.compile("PERMISSION_DENIED: |UNAUTHENTICATED: ")
_DRIVERS = ("aiohttp", "botocore", "gcsfs", "google", "requests", "s3fs", "urllib3")


@contextlib.contextmanager
def reached(place: str | os.PathLike, then: str = "") -> Iterator[None]:
    """For the block, in which a library reads or writes at an address by itself.

    Args:
      then: ends the sentence: what is to be done, or what of it stays.

    Raises:
      UnavailableError: it failed since the address cannot be reached, which is no damage of what
        lies there; one sentence.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if is_object(place) and (reason := no_answer(e, spelled(place))):
            raise UnavailableError(f"{spelled(place)}: {reason}{then}") from e
        raise


def no_answer(error: BaseException, address: str = "gs://") -> str:
    """Why an address cannot be reached, if that is what an error of a library says; else ""."""
    for e in _chain(error):
        name, status = type(e).__module__.split(".")[0], getattr(e, "status", None)
        if _DENIED.match(str(e)):
            return f"permission denied ({_words(e)}); {_LOGIN[scheme(address)]}"
        if found := _NO_ANSWER.match(str(e)):
            return f"no answer: {' '.join(found['words'].split())[:200]}"
        if str(getattr(e, "code", status)) == "404" or isinstance(e, FileNotFoundError):
            return ""
        if name in _DRIVERS or isinstance(e, ConnectionError | TimeoutError):
            return _for_good(e, address) or f"no answer: {_words(e)}"
    return ""


def check_installed(address: str) -> None:
    """Refuse an address whose driver is missing.

    Raises:
      UserError: names the extra.
    """
    _driver(scheme(address))


def is_glob(path: str) -> bool:
    """Whether it has the signs of a glob."""
    return any(c in path for c in "*?[")


def find(pattern: str) -> list[Found]:
    """The objects that an address means: itself, all below it, or those that match a glob, or lie
    in a folder that does.

    Sorted by their parts. Empty if there are none.

    Raises:
      UserError: as the module says; or there is no such bucket.
    """

    def listed(driver: Any, path: str) -> dict[str, dict[str, Any]]:
        driver.invalidate_cache()
        if not is_glob(path):
            return driver.find(path, detail=True)
        entries = driver.glob(path, detail=True)
        if "**" not in path:  # which lists what is below; any other pattern means the folder itself
            for name in [n for n, entry in entries.items() if entry["type"] == "directory"]:
                entries |= driver.find(name, detail=True)
        return entries

    try:
        entries = _call(pattern, listed)
    except FileNotFoundError:
        entries = {}
    if not entries:
        bucket = spelled(pattern).partition("://")[2].partition("/")[0]
        try:
            _call(pattern, lambda driver, _: driver.ls(bucket, detail=False))
        except FileNotFoundError as e:
            raise UserError(f"{spelled(pattern)}: there is no bucket {bucket!r}") from e
    found = [_found(pattern, entry) for entry in entries.values() if entry["type"] == "file"]
    return sorted(found, key=lambda f: pathlib.PurePosixPath(f.address).parts)


def stat(address: str) -> Found | None:
    """The object at an address; None if there is none."""

    def info(driver: Any, path: str) -> dict[str, Any]:
        driver.invalidate_cache()
        return driver.info(path)

    try:
        entry = _call(address, info)
    except FileNotFoundError:
        return None
    return _found(address, entry) if entry["type"] == "file" else None


def _found(address: str, entry: dict[str, Any]) -> Found:
    tag = entry.get("ETag") or entry.get("etag") or entry.get("md5Hash") or entry.get("generation")
    return Found(f"{scheme(address)}://{entry['name']}", int(entry["size"]), str(tag or ""))


class _Object(io.RawIOBase):
    # Reads blocks of an object; each is tried again by itself, so that a connection that breaks in
    # the middle of a file is nothing to its reader.

    def __init__(self, address: str, size: int):
        self._address, self._size, self._at = address, size, 0
        self._begin, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._size:
            return 0
        if not self._begin <= self._at < self._begin + len(self._block):
            self._begin, end = self._at, min(self._at + BLOCK_BYTES, self._size)
            self._block = _call(self._address, functools.partial(_range, self._at, end))
        start = self._at - self._begin
        data = self._block[start : start + len(buffer)]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _range(begin: int, end: int, driver: Any, path: str) -> bytes:
    data = driver.cat_file(path, start=begin, end=end)
    if len(data) != end - begin:
        raise ConnectionError(f"{len(data)} of {end - begin} bytes came")
    return data


def open_object(address: str) -> io.BufferedReader:
    """Open an object for reading, as bytes, at any place.

    Raises:
      UserError: nothing is there, or as the module says; reading may raise it, too.
    """
    found = stat(address)
    if found is None:
        raise UserError(f"{spelled(address)} does not exist")
    return io.BufferedReader(_Object(found.address, found.size), 1 << 16)


def put(source: pathlib.Path, address: str) -> Found:
    """Copy a file to an address; an object appears whole or not at all, and is returned.

    Raises:
      UserError: as the module says.
    """

    def copy(driver: Any, path: str) -> Found:
        driver.put_file(str(source), path)
        found = stat(address)
        if found is None or found.size != source.stat().st_size:
            raise ConnectionError("it is not there after it was written, or cut off")
        return found

    try:
        return _call(address, copy)
    except FileNotFoundError as e:
        raise UserError(f"{spelled(address)}: there is no such bucket") from e


def move(folder: str | os.PathLike, target: str | os.PathLike) -> None:
    """Move all objects below an address; killed, it leaves all of them at the old or the new."""
    old, new = (spelled(place).rstrip("/") for place in (folder, target))
    found = find(old)
    for f in found:
        to = new.partition("://")[2] + f.address.removeprefix(old)
        _call(f.address, lambda driver, path: driver.cp_file(path, to))  # noqa: B023
    for f in found:
        remove(f.address)


def remove(address: str) -> None:
    """Remove an object, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        _call(address, lambda driver, path: driver.rm_file(path))


def check_writable(address: str, what: str) -> None:
    """Refuse, before work, a place where no object can be written: one is written, and removed
    where that is allowed.

    Raises:
      UserError: names `what`, the flag or field, and why.
    """
    probe = f"{spelled(address).rstrip('/')}/.soup_jax-probe"
    try:
        _call(probe, lambda driver, path: driver.pipe_file(path, b"?"))
    except FileNotFoundError as e:
        raise UserError(f"{what}={spelled(address)}: there is no such bucket") from e
    except UserError as e:
        raise UserError(f"{what}={spelled(address)} cannot be written: {e}") from e
    with contextlib.suppress(UserError):
        remove(probe)
