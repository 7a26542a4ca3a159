"""One way in: files that a user or an earlier run gave are opened, limited and checked here.

What can be wrong with a file is said in a `UserError`: its kind (a folder, a pipe), its size, its
encoding, its structure, its version. No read can wait for ever or fill the memory.
"""

import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Mapping
from io import BufferedReader
from typing import Any

from soup_jax import remote, storage
from soup_jax.errors import UserError

# Of files that are read as a whole. The largest that soup_jax writes, domains.json of 16,384
# domains, has 10 MB.
MAX_TEXT_BYTES = 1 << 28


def open_file(path: str | os.PathLike) -> BufferedReader:
    """Open a file, or an object at a gs:// or s3:// address, for reading, as bytes.

    Raises:
      UserError: another address, missing, not to be read, or no regular file: a pipe would be
        waited for.
    """
    if remote.is_object(path):
        return remote.open_object(os.fspath(path))
    storage.refuse_address(path, objects=True)
    try:
        # Not waiting for a writer, if it is a pipe. For a regular file the flag means nothing.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as e:  # ValueError: a zero byte in the path
        raise UserError(_cannot_read(path, e)) from e
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        kind = "a folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "no regular file"
        os.close(descriptor)
        raise UserError(f"{path} is {kind}; a file is expected")
    return os.fdopen(descriptor, "rb")


def _cannot_read(path: str | os.PathLike, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path} does not exist"
    reason = getattr(error, "strerror", None) or str(error)
    return f"cannot read {path}: {reason}"


def sha256_file(path: str | os.PathLike) -> str:
    """Hex SHA-256 of a file's content, read in pieces.

    Raises:
      UserError: as `open_file`, or it cannot be read to its end.
    """
    with open_file(path) as f:
        try:
            return hashlib.file_digest(f, "sha256").hexdigest()
        except OSError as e:
            raise UserError(_cannot_read(path, e)) from e


def read_text(path: str | os.PathLike, *, limit: int = MAX_TEXT_BYTES) -> str:
    """The whole of a UTF-8 file.

    Raises:
      UserError: as `open_file`; more than `limit` bytes; not UTF-8.
    """
    with open_file(path) as f:
        try:
            data = f.read(limit + 1)
        except OSError as e:
            raise UserError(_cannot_read(path, e)) from e
    if len(data) > limit:
        raise UserError(f"{path} has more than {limit:,} bytes: it is not what belongs there")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start}: {e.reason})") from e


def read_json(path: str | os.PathLike, like: Any = None, *, limit: int = MAX_TEXT_BYTES) -> Any:
    """Read a JSON file, and check its structure with `check_structure` if `like` is given.

    Raises:
      UserError: as `read_text`; not JSON; another structure.
    """
    text = read_text(path, limit=limit)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{path} is not valid JSON: {e or 'nested too deeply'}") from e
    if like is not None:
        check_structure(value, like, path)
    return value


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number of JSON")


_WORDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    int: "an integer",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def check_structure(value: Any, like: Any, where: str | os.PathLike) -> None:
    """Compare a value of JSON with the structure that is expected of it.

    Args:
      like: a type (float takes integers, int takes no bool); a list of one: a list of such values;
        a mapping from names: an object with these fields and perhaps others. `name?` may be
        missing, and the key `...` stands for any name.
      where: of the value, for the message.

    Raises:
      UserError: says at which field, what is there and what is expected.
    """
    problem = _difference(value, like, "")
    if problem:
        raise UserError(f"{where} is damaged, or was not written by soup_jax: {problem}")


def _difference(value: Any, like: Any, at: str) -> str:
    kind = like if isinstance(like, type) else type(like)
    kind = dict if isinstance(like, Mapping) else kind
    allowed = (int, float) if kind is float else (kind,)
    name = at.lstrip(".") or "it"
    if type(value) not in allowed:
        found = _WORDS.get(type(value), type(value).__name__)
        return f"{name} is {found}, expected {_WORDS.get(kind, kind.__name__)}"
    if isinstance(like, list):
        for i, item in enumerate(value):
            if problem := _difference(item, like[0], f"{at}[{i}]"):
                return problem
    if isinstance(like, Mapping):
        for field, expected in like.items():
            if field is ...:
                names = list(value)
            else:
                names = [field.removesuffix("?")]
                if names[0] not in value:
                    if field.endswith("?"):
                        continue
                    return f"{f'{at}.{field}'.lstrip('.')} is missing"
            for each in names:
                if problem := _difference(value[each], expected, f"{at}.{each}"):
                    return problem
    return ""


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


def check_seal(value: Mapping[str, Any], where: str | os.PathLike) -> None:
    """Compare an object that was written with `storage.sealed`; earlier versions wrote no seal.

    Raises:
      UserError: it was changed since.
    """
    if "seal" in value and value != storage.sealed(value):
        raise UserError(
            f"{where} was changed since soup_jax wrote it (its seal is that of another content): "
            "restore the original, or make it again"
        )


def read_tensors(path: str | os.PathLike) -> dict[str, Any]:
    """The tensors of a safetensors file, as NumPy arrays.

    Raises:
      UserError: as `open_file`; no safetensors file, or a damaged one.
    """
    import safetensors
    import safetensors.numpy

    open_file(path).close()
    try:
        return safetensors.numpy.load_file(pathlib.Path(path))
    except (OSError, ValueError, KeyError, safetensors.SafetensorError) as e:
        raise UserError(f"cannot read {path}: it is no safetensors file, or damaged: {e}") from e
