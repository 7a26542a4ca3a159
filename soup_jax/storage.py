"""One way out: files and folders that appear whole or not at all; stable JSON; content hashes.

What a killed process left half-made is removed when the same file or folder is written again.
"""

import contextlib
import errno
import fcntl
import hashlib
import itertools
import json
import math
import os
import pathlib
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from typing import Any

from soup_jax import remote
from soup_jax.errors import UserError

CACHE_VARIABLE = "SOUP_JAX_CACHE_DIR"

_FIRST = time.time_ns()  # above the numbers of an earlier process with this one's pid
_numbers = itertools.count(_FIRST)


_TEMPORARY = re.compile(r"\..+\.(?P<host>[0-9a-f]{8})\.(?P<pid>\d+)\.(?P<number>\d+)\.tmp")


def json_text(value: Any) -> str:
    """`value` as JSON whose bytes depend on nothing but `value`; NaN is refused.

    UTF-8 can hold it: lone surrogates, by which Python spells a file name that is not UTF-8, are
    written as JSON's escapes and read back as what they were.
    """
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    A process killed inside the block leaves the old file, or none, never half of the new one. After
    the block the new one survives a power cut.

    Raises:
      UserError: it is an address, of which pathlib would make a folder gs: where we are.
    """
    refuse_address(path)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A new, empty folder beside `path` that takes its place when the block ends without an error.

    A process killed inside the block leaves the old folder, or none. One that is killed between
    moving the old and the new leaves the old beside it; `recover_folder` brings it back.

    Raises:
      UserError: it is an address.
    """
    refuse_address(path)
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    recover_folder(path)
    temporary = _temporary(path)
    old = temporary.with_suffix(".old")
    temporary.mkdir()
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        if path.exists():
            os.replace(path, old)
        os.replace(temporary, path)
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)


def recover_folder(path: str | os.PathLike) -> None:
    """Finish what a killed `atomic_folder` of this path left: the old folder, if it has no new."""
    path = pathlib.Path(path)
    for left in _leftovers(path, ".old"):
        if path.exists():
            shutil.rmtree(left, ignore_errors=True)
        else:
            os.replace(left, path)


@contextlib.contextmanager
def temporary_folder(name: str) -> Iterator[pathlib.Path]:
    """A new folder among the temporary files of the system, for the block.

    Folders of this name that killed processes left are removed before.
    """
    folder = _temporary(pathlib.Path(tempfile.gettempdir(), name))
    folder.mkdir(mode=0o700)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _temporary(path: pathlib.Path) -> pathlib.Path:
    for left in _leftovers(path, ".tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):  # another user's, perhaps
                left.unlink()
    return path.with_name(f".{path.name}.{_host()}.{os.getpid()}.{next(_numbers)}.tmp")


def files_in(folder: str | os.PathLike) -> list[pathlib.Path]:
    """All files below a folder, sorted, but for temporary ones; those of dead processes go."""
    found = []
    for path in sorted(pathlib.Path(folder).rglob("*")):
        if not path.is_file():
            continue
        if match := _TEMPORARY.fullmatch(path.name):
            if match["host"] == _host() and _is_left(match["pid"], match["number"]):
                path.unlink(missing_ok=True)
        else:
            found.append(path)
    return found


def _leftovers(path: pathlib.Path, suffix: str) -> Iterator[pathlib.Path]:
    # Of processes of this machine that are no more; another machine's may be at work.
    if not path.parent.is_dir():
        return
    prefix = re.escape(f".{path.name}.{_host()}.")
    for entry in list(path.parent.iterdir()):
        match = re.fullmatch(rf"{prefix}(\d+)\.(\d+)\{suffix}", entry.name)
        if match and _is_left(*match.groups()):
            yield entry


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def _is_left(pid: str, number: str) -> bool:
    # In a container every start of a program tends to have the same pid.
    if int(pid) == os.getpid():
        return int(number) < _FIRST
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except OSError:
        pass
    return False


def _sync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as e:
        if e.errno not in (errno.EINVAL, errno.ENOTSUP):  # a file system without it
            raise
    finally:
        os.close(descriptor)


def fetch(address: str, target: pathlib.Path) -> None:
    """Copy an object of `remote` to a file, whole or not at all.

    Raises:
      UserError: it is not there, or cannot be read.
    """
    with (
        remote.open_object(address) as source,
        atomic_path(target) as path,
        path.open("wb") as f,
    ):
        shutil.copyfileobj(source, f, remote.BLOCK_BYTES)


def copies(kind: str) -> pathlib.Path:
    """The folder of copies of what lies in buckets, of a kind: corpora, or folders.

    It is below $SOUP_JAX_CACHE_DIR; default: below ~/.cache/soup_jax.

    Raises:
      UserError: the variable holds an address.
    """
    chosen = os.environ.get(CACHE_VARIABLE, "")
    refuse_address(chosen, CACHE_VARIABLE)
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return pathlib.Path(chosen or pathlib.Path(home, "soup_jax")) / kind


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with the hash of its other fields as "seal"; `inputs.check_seal` reads it."""
    rest = {name: x for name, x in value.items() if name != "seal"}
    return {**rest, "seal": sha256_bytes(json_text(rest).encode())}


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as stable JSON, atomically."""
    write_text(path, json_text(value))


def nulled(value: Any) -> Any:
    """A copy of a JSON-ready `value` with None for each number that JSON cannot hold: NaN, inf."""
    if isinstance(value, Mapping):
        return {name: nulled(x) for name, x in value.items()}
    if isinstance(value, list | tuple):
        return [nulled(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def refuse_address(path: str | os.PathLike, what: str = "", *, objects: bool = False) -> None:
    """Refuse gs://, s3://, https:// and the like where only a file system will do.

    Args:
      what: the flag or field that names the place, for the message.
      objects: let those pass that `remote` reads.

    Raises:
      UserError: it is an address.
    """
    if not remote.scheme(path) or (objects and remote.is_object(path)):
        return
    place = f"{what}{'=' * bool(what)}{remote.spelled(path)}"
    if objects:
        known = " and ".join(f"{scheme}://" for scheme in remote.EXTRAS)
        raise UserError(f"{place} is an address that cannot be read: {known} can, and files")
    raise UserError(
        f"{place} is an address, and only files and folders of a file system can be read or "
        "written here: mount the bucket there, or copy what it holds"
    )


def check_file_target(path: str | os.PathLike, what: str) -> None:
    """Refuse, before work, a place where no file can be written; nothing is made.

    Args:
      what: the flag or field that names the place, for the message.

    Raises:
      UserError: an address, a folder or device is there, or its folder cannot be written.
    """
    refuse_address(path, what)
    path = pathlib.Path(path)
    if os.path.lexists(path) and not path.is_file():
        kind = "a folder" if path.is_dir() else "no regular file"
        raise UserError(f"{what}={path} is {kind}; name a file that can be written")
    _check_parent(path, path.parent, what)


def check_folder_target(path: str | os.PathLike, what: str) -> None:
    """Refuse, before work, a place where no folder can be made or written; as above.

    Raises:
      UserError: an address, a file is there, or it cannot be written.
    """
    refuse_address(path, what)
    path = pathlib.Path(path)
    if os.path.lexists(path) and not path.is_dir():
        raise UserError(f"{what}={path} is no folder; name a folder, there or to be made")
    _check_parent(path, path, what)


def _check_parent(path: pathlib.Path, folder: pathlib.Path, what: str) -> None:
    folder = folder.absolute()
    try:
        while not os.path.lexists(folder):
            folder = folder.parent
        if not folder.is_dir():
            raise UserError(f"{what}={path} cannot be made: {folder} is no folder")
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        raise UserError(f"{what}={path} cannot be written: {folder}: {e.strerror}") from e


def check_room(folder: str | os.PathLike, num_bytes: int, what: str) -> None:
    """Refuse work whose result has no room on the disk.

    Raises:
      UserError: less than `num_bytes` are free where `folder` is, or will be.
    """
    place = pathlib.Path(folder).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < num_bytes:
        raise UserError(
            f"{what} needs {num_bytes / 1e6:,.1f} MB, and {place} has {free / 1e6:,.1f} MB free: "
            "make room or choose another disk"
        )


_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL, errno.EBADF, errno.ENOSYS)


@contextlib.contextmanager
def locked(folder: pathlib.Path, refusal: str, *, shared: bool = False) -> Iterator[None]:
    """Holds a lock on an existing folder for the block; the end of the process frees it, too.

    Args:
      shared: others that share it may hold it at the same time.

    Raises:
      UserError: with the text `refusal`, if another process holds it.
    """
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(refusal) from e
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise  # else a file system that knows no locks
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def waiting(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a file, which is made, for the block; waits for who holds it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        with contextlib.suppress(OSError):  # a file system without locks: work is done twice
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()
