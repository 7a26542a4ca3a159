"""Small file habits shared by every artefact: atomic writes, stable JSON, content hashes."""

import contextlib
import hashlib
import json
import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

from soup_jax.errors import UserError


def json_text(value: Any) -> str:
    """`value` as JSON whose bytes depend on nothing but `value`; NaN is refused."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error.

    A process killed inside the block leaves the old file, or none, never half of the new one.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(fd)
    temporary = pathlib.Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes 0600; others may read a corpus
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write `value` as stable JSON, atomically."""
    write_text(path, json_text(value))


def read_json(path: str | os.PathLike) -> Any:
    """Read a JSON file; UserError when it is missing or not JSON."""
    try:
        return json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise UserError(f"{path} does not exist") from e
    except ValueError as e:
        raise UserError(f"{path} is not valid JSON: {e}") from e


def read_format(value: Any, where: str | os.PathLike, *, newest: int) -> int:
    """The format number of an artefact's JSON object; 1 if it has none, as the first of some had.

    Raises:
      UserError: no JSON object, or of a format above `newest`, the one that is written today.
    """
    if not isinstance(value, dict):
        raise UserError(f"{where} holds no JSON object: it was not written by soup_jax, or damaged")
    number = value.get("format", 1)
    if type(number) is not int or number < 1:
        raise UserError(f"{where} has the format {number!r}, which no version of soup_jax wrote")
    if number > newest:
        raise UserError(
            f"{where} has format {number}, this version of soup_jax reads formats up to {newest}: "
            "upgrade it with `pip install --upgrade soup_jax`"
        )
    return number


def sha256_bytes(data: bytes) -> str:
    """Hex SHA-256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's content, read in pieces."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
