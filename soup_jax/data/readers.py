"""The documents of one file: its bytes, decompressed, to texts with their places.

A text file is one document, exactly as its bytes are (a byte-order mark aside). Lines of JSON hold
an object with the text in one field; lines of white space alone are no damage. Rows of Parquet hold
it in one column.

Memory holds one line, one Parquet batch or one text file at a time, and at most MAX_DOCUMENT_BYTES
of it: what is compressed is decompressed in pieces that are small whatever it claims to be.
"""

import dataclasses
import errno
import hashlib
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import zstandard

from soup_jax import inputs
from soup_jax.data import decompress
from soup_jax.data.damage import Report, listed
from soup_jax.errors import UnavailableError, UserError

# The largest text file, JSON line or Parquet value that is taken for a document: the text of 40
# books. Python holds it as bytes and with up to four bytes a character.
MAX_DOCUMENT_BYTES = 32 << 20
# Objects and lists of a JSON line, each of which takes a hundred times its two characters.
MAX_CONTAINERS = 1 << 20
# Of a network file system, for the moment.
_UNREACHABLE = (errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN)
_PARQUET_ROWS = 8  # as long as a document may be, they take a quarter of a gigabyte
_PARQUET_BUFFER = 1 << 20
_DOMAIN_CHARS = 200  # of the name of a domain
_TOO_LARGE = "the limit for one document is {:,} bytes"


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file or object to read: where it is, the name that reports use, and how to read it."""

    path: str
    kind: str  # text, lines or parquet
    compression: str  # "", ".gz" or ".zst"
    size: int = 0  # bytes
    tag: str = ""  # of an object; changes with its content


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, where it stands (`line` counts from 1), its `text_hash`, and its domain's name."""

    text: str
    source: str
    line: int
    hash: bytes
    domain: str = ""


@dataclasses.dataclass(frozen=True)
class Fields:
    """Fields of JSON lines or columns of Parquet: of the text, and of the domain or "" for none."""

    text: str
    domain: str = ""


def text_hash(text: str) -> bytes:
    """16 bytes of BLAKE2b over the UTF-8 text: the identity of a document."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def short_hashes(hashes: np.ndarray) -> np.ndarray:
    """uint64 [n] of `text_hash`es uint8 [n, 16]: the half that no split is made by."""
    return hashes[:, 8:].copy().view(">u8").ravel().astype(np.uint64)


def read_file(
    source: SourceFile, fields: Fields, report: Report, skip: int = 0
) -> Iterator[Document]:
    """Documents of one file; what is damaged goes to `report`, and reading goes on behind it.

    Args:
      skip: lines or rows at the beginning that are neither returned nor reported.
    """
    line = 0
    try:
        for line, value, domain in _READERS[source.kind](source, fields, report, skip):
            if not value.strip():
                report.add("empty", source.path, line, "the text is empty or white space")
                continue
            if fields.domain and not (name := _domain_name(domain)):
                reason = f"{fields.domain!r} is {str(domain)[:50]!r}, not a number or a short name"
                report.add("no_domain", source.path, line, reason)
                continue
            try:
                digest = text_hash(value)
            except UnicodeEncodeError as e:
                report.add("invalid_utf8", source.path, line, f"not a Unicode text: {e.reason}")
                continue
            yield Document(value, source.path, line, digest, name if fields.domain else "")
    except (EOFError, zlib.error, zstandard.ZstdError) as e:
        report.add("truncated", source.path, line, f"after this line: {e}")
    except (decompress.TooLargeError, MemoryError) as e:
        report.add("too_large", source.path, line, str(e) or "the memory is full")
    except UnavailableError:  # what lies there may be sound: no property of the source
        raise
    except OSError as e:
        if e.errno in _UNREACHABLE:
            raise
        report.add("unreadable", source.path, line, e.strerror or str(e))
    except UserError as e:  # of `open_file`
        report.add("unreadable", source.path, line, str(e))


def _domain_name(value: Any) -> str:
    # "" for what names no domain. Tools write integers with gaps as floats.
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    name = str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    return name if len(name) <= _DOMAIN_CHARS and name.isprintable() else ""


def _read_text(
    source: SourceFile, fields: Fields, report: Report, skip: int
) -> Iterator[tuple[int, str, Any]]:
    if skip:
        return
    parts, size = [], 0
    for chunk in decompress.chunks(source.path, source.compression):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_DOCUMENT_BYTES:
            raise decompress.TooLargeError(
                f"{_TOO_LARGE.format(MAX_DOCUMENT_BYTES)}, and a text file is one document: cut it "
                "into files (`split -C 30m --additional-suffix=.txt FILE`), or make it .jsonl, a "
                "document a line"
            )
    data = b"".join(parts)
    parts.clear()
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        reason = f"byte {e.start}: {e.reason}{_encoding_hint(data)}"
        report.add("invalid_utf8", source.path, 0, reason)
        return
    if hint := _encoding_hint(data):
        report.add("invalid_utf8", source.path, 0, f"zero bytes{hint}")
        return
    del data
    yield 1, text, None


def _read_lines(
    source: SourceFile, fields: Fields, report: Report, skip: int
) -> Iterator[tuple[int, str, Any]]:
    field, chunks = fields.text, decompress.chunks(source.path, source.compression)
    for number, data in enumerate(_lines(chunks), start=1):
        if number <= skip or (data is not None and not data.strip()):
            continue
        if data is None:
            reason = f"a longer line; {_TOO_LARGE.format(MAX_DOCUMENT_BYTES)}"
            report.add("too_large", source.path, number, reason)
            continue
        if (count := _containers(data)) > MAX_CONTAINERS:
            reason = f"{count:,} JSON objects and lists; the limit for a line is {MAX_CONTAINERS:,}"
            report.add("too_large", source.path, number, reason)
            continue
        try:
            record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as e:
            reason = f"byte {e.start}: {e.reason}{_encoding_hint(data)}"
            report.add("invalid_utf8", source.path, number, reason)
            continue
        except MemoryError:
            report.add("too_large", source.path, number, "the line does not fit into the memory")
            continue
        except (ValueError, RecursionError) as e:
            report.add("broken_json", source.path, number, f"{e}{_encoding_hint(data)}")
            continue
        if not isinstance(record, dict):
            kind = type(record).__name__
            report.add("broken_json", source.path, number, f"a JSON object expected, found {kind}")
        elif not isinstance(text := record.get(field), str):
            reason = (
                f"{field!r} is {type(text).__name__}, not a text"
                if field in record
                else f"no field {field!r}; the fields are {listed(list(record))}"
            )
            report.add("no_text", source.path, number, reason, field=_longest_text(record))
        else:
            domain = record.get(fields.domain)
            del record, data
            yield number, text, domain


def _containers(data: bytes) -> int:
    # An upper bound for most lines; those with more brackets are counted outside of strings.
    most = data.count(b"{") + data.count(b"[")
    if most <= MAX_CONTAINERS:
        return most
    array = np.frombuffer(data.replace(b"\\\\", b"").replace(b'\\"', b""), np.uint8)
    inside = np.logical_xor.accumulate(array == ord('"'))
    return int(np.count_nonzero(((array == ord("{")) | (array == ord("["))) & ~inside))


def _longest_text(record: dict[str, Any]) -> str:
    texts = {name: len(x) for name, x in record.items() if isinstance(x, str)}
    return max(texts, key=lambda name: texts[name], default="")[:50]


def _encoding_hint(data: bytes) -> str:
    # UTF-16 begins with a mark, or has a zero byte in almost every Latin letter.
    head = data[:4096]
    if head.startswith((b"\xff\xfe", b"\xfe\xff")) or 4 * head.count(b"\0") > len(head):
        return "; it looks like UTF-16: convert it, `iconv -f UTF-16 -t UTF-8 FILE > NEW`"
    return ""


def _read_parquet(
    source: SourceFile, fields: Fields, report: Report, skip: int
) -> Iterator[tuple[int, str, Any]]:
    import pyarrow  # slow to import and needed for this kind alone
    import pyarrow.parquet

    number, field = 0, fields.text
    try:
        with (
            inputs.open_file(source.path) as f,
            # Buffered: else all of a column's row group is read at once.
            pyarrow.parquet.ParquetFile(f, buffer_size=_PARQUET_BUFFER) as file,
        ):
            schema = file.schema_arrow
            texts = [name for name in schema.names if _is_text(schema.field(name).type)]
            if field not in texts:
                reason = (
                    f"the column {field!r} is {str(schema.field(field).type)[:50]}, not a text"
                    if field in schema.names
                    else f"no column {field!r}; there are {listed(schema.names)}"
                )
                report.add("no_text", source.path, 0, reason, field=texts[0] if texts else "")
                return
            if fields.domain and fields.domain not in schema.names:
                reason = f"no column {fields.domain!r}; there are {listed(schema.names)}"
                report.add("no_domain", source.path, 0, reason)
                return
            columns = [field, *filter(None, [fields.domain])]
            for batch in file.iter_batches(_PARQUET_ROWS, columns=columns, use_threads=False):
                domains = batch.column(fields.domain) if fields.domain else itertools.repeat(None)
                for scalar, domain in zip(batch.column(field), domains):
                    number += 1
                    if number > skip:
                        for text in _parquet_text(scalar, number, source, field, report):
                            yield number, text, domain and _value(domain)
    except MemoryError:  # pyarrow's too
        reason = "the rows that follow do not fit into the memory: write smaller pages"
        report.add("too_large", source.path, number, reason)
    except pyarrow.ArrowException as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        report.add("unreadable", source.path, number, reason)


def _value(scalar: Any) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        return None


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _parquet_text(
    scalar: Any, number: int, source: SourceFile, field: str, report: Report
) -> Iterator[str]:
    value = getattr(scalar, "value", scalar) if scalar.is_valid else scalar  # of a dictionary
    buffer = value.as_buffer() if value.is_valid and hasattr(value, "as_buffer") else None
    if buffer is None:
        report.add("no_text", source.path, number, f"{field!r} is null")
    elif buffer.size > MAX_DOCUMENT_BYTES:
        reason = f"a longer text; {_TOO_LARGE.format(MAX_DOCUMENT_BYTES)}"
        report.add("too_large", source.path, number, reason)
    else:
        try:
            yield str(buffer, "utf-8")
        except UnicodeDecodeError as e:
            report.add("invalid_utf8", source.path, number, f"byte {e.start}: {e.reason}")


_READERS: dict[str, Callable[[SourceFile, Fields, Report, int], Iterator[tuple[int, str, Any]]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "parquet": _read_parquet,
}


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes | None]:
    """Lines without their end, split at b"\\n" only; the last one may lack it.

    None stands for a line of more than MAX_DOCUMENT_BYTES.
    """
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            size += len(line)
            yield b"".join([*parts, line]) if size <= MAX_DOCUMENT_BYTES else None
            parts, size = [], 0
        size += len(rest)
        parts.append(rest)
        if size > MAX_DOCUMENT_BYTES:
            parts.clear()
    if size:
        yield b"".join(parts) if size <= MAX_DOCUMENT_BYTES else None
