"""Source files to documents: find, read, report damage, deduplicate, split.

1. `find_files`     sources (files, folders, globs)  -> SourceFile, in a fixed order
2. `read_documents` SourceFile                       -> Document(text, source, line, hash)
3. `split_of`       hash                             -> "train", "validation" or "held_out"

Memory holds one line, one Parquet batch or one text file at a time. Damage never stops the reading:
every damaged line or file goes to a `Report` with its place and its reason, and the reading goes on
around it. This module does not tokenise and does not know domains.

A text file is one document, exactly as its bytes are (a byte-order mark aside). Lines of JSON hold
an object with the text in one field; lines of white space alone are no damage. Order: sources as
given, inside a folder or glob by path; a file that two sources name is read once.
"""

import dataclasses
import glob
import hashlib
import json
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import zstandard

from soup_jax.errors import UserError

_TEXT_SUFFIXES = (
    ".txt .text .md .markdown .rst .org .adoc .tex .bib .html .htm .xml .po .srt .log "
    ".py .pyi .ipy .c .h .cc .cpp .cxx .hh .hpp .cu .cs .java .kt .scala .go .rs .swift .m .mm "
    ".js .jsx .mjs .ts .tsx .css .scss .php .pl .pm .rb .lua .r .jl .f .f90 .f95 .hs .ml .mli "
    ".clj .lisp .el .scm .ex .exs .erl .d .nim .zig .v .vhd .sv .s .asm .sh .bash .zsh .ps1 .bat "
    ".sql .toml .yaml .yml .ini .cfg .cmake .mk .gradle .proto .thrift .graphql .vim .diff "
    ".patch"
)
TEXT_SUFFIXES = frozenset(_TEXT_SUFFIXES.split())
LINE_SUFFIXES = frozenset((".jsonl", ".ndjson"))
COMPRESSIONS = frozenset((".gz", ".zst"))
# A line longer than this is taken for damage: it would otherwise fill the memory.
MAX_LINE_BYTES = 1 << 30
_READ_BYTES = 1 << 16
_PARQUET_ROWS = 256

# What can be wrong with a line or a file, in the order of the summary.
DAMAGE = {
    "broken_json": "lines that are not a JSON object",
    "no_text": "records without a text (field missing or not a string)",
    "empty": "empty documents",
    "invalid_utf8": "lines or files that are not UTF-8",
    "truncated": "files that end or break in the middle (what came before was read)",
    "unreadable": "files or folders that cannot be read",
}
# What `Report.to_json` returns.
REPORT = {
    "counts": {...: int},
    "entries": {...: [{"source": str, "line": int, "reason": str}]},
}
MAX_ENTRIES = 1000  # damage listed one by one, per kind; all of it is counted


@dataclasses.dataclass(frozen=True)
class SourceFile:
    """A file to read: where it is, the name that reports use, and how to read it."""

    path: str
    kind: str  # text, lines or parquet
    compression: str  # "", ".gz" or ".zst"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, where it stands (`line` counts lines or rows from 1), and its `text_hash`."""

    text: str
    source: str
    line: int
    hash: bytes


class Report:
    """Damage found while reading: all of it counted, the first MAX_ENTRIES of a kind listed."""

    def __init__(self, value: dict[str, Any] | None = None):
        """Empty, or from what `to_json` returned."""
        value = value or {}
        self.counts: dict[str, int] = dict(value.get("counts", {}))
        self.entries: dict[str, list[dict[str, Any]]] = {
            kind: list(entries) for kind, entries in value.get("entries", {}).items()
        }

    def add(self, kind: str, source: str, line: int, reason: str) -> None:
        """Record one damaged line (0: the file itself); `kind` is a key of DAMAGE."""
        assert kind in DAMAGE, kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        entries = self.entries.setdefault(kind, [])
        if len(entries) < MAX_ENTRIES:
            entries.append({"source": source, "line": line, "reason": reason})

    def merge(self, other: "Report") -> None:
        """Append what `other` found later."""
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
            entries = self.entries.setdefault(kind, [])
            entries.extend(other.entries.get(kind, [])[: MAX_ENTRIES - len(entries)])

    def take(self) -> "Report":
        """What was found since the last call; `self` is empty afterwards."""
        taken = Report(self.to_json())
        self.counts, self.entries = {}, {}
        return taken

    def to_json(self) -> dict[str, Any]:
        """Counts and entries, JSON-ready."""
        return {"counts": dict(self.counts), "entries": dict(self.entries)}

    def lines(self) -> list[str]:
        """One line per kind of damage found, with its first place."""
        result = []
        for kind, meaning in DAMAGE.items():
            if self.counts.get(kind):
                first = self.entries[kind][0]
                place = first["source"] + (f":{first['line']}" if first["line"] else "")
                result.append(f"{self.counts[kind]} {meaning}; first {place}: {first['reason']}")
        return result


def text_hash(text: str) -> bytes:
    """16 bytes of BLAKE2b over the UTF-8 text: the identity of a document."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()


def hash_fraction(digest: bytes) -> float:
    """A number in [0, 1) that is uniform over documents and fixed by the content alone."""
    return (int.from_bytes(digest[:8], "big") >> 11) / (1 << 53)


def split_of(digest: bytes, validation_fraction: float, held_out_fraction: float) -> str:
    """The split of a document: by its content's hash only, never by order or by neighbours."""
    fraction = hash_fraction(digest)
    if fraction < validation_fraction:
        return "validation"
    if fraction < validation_fraction + held_out_fraction:
        return "held_out"
    return "train"


def file_format(path: str) -> tuple[str, str] | None:
    """(kind, compression) by the suffixes of a path, or None for an unknown one."""
    name = os.path.basename(path).lower()
    stem, suffix = os.path.splitext(name)
    compression = suffix if suffix in COMPRESSIONS else ""
    if compression:
        suffix = os.path.splitext(stem)[1]
    if suffix in LINE_SUFFIXES or (suffix == ".json" and compression):
        return "lines", compression
    if suffix in TEXT_SUFFIXES:
        return "text", compression
    if suffix == ".parquet" and not compression:
        return "parquet", ""
    return None


def find_files(sources: Sequence[str], report: Report) -> list[SourceFile]:
    """The files of `sources`: each a file, a folder (searched recursively) or a glob (`**` too).

    Folders and globs take files with a known suffix and pass over hidden ones.

    Raises:
      UserError: no sources, one that matches nothing, or a file named with an unknown suffix.
    """
    if isinstance(sources, str):
        sources = (sources,)
    if not sources:
        raise UserError(
            "no sources: set --config.corpus.sources to files, folders or globs, "
            "for example \"('data/*.jsonl.zst',)\""
        )
    found: dict[str, SourceFile] = {}
    for source in sources:
        paths = list(_expand(source, report))
        if not paths:
            raise UserError(
                f"the source {source!r} matches no file that can be read as text; known are "
                ".txt, .md, .py and other text suffixes, .jsonl, .json.gz (one object a line), "
                "each also as .gz or .zst, and .parquet. Relative paths start at the working "
                f"folder, {os.getcwd()}"
            )
        for path in paths:
            kind, compression = file_format(path) or ("", "")
            found.setdefault(os.path.realpath(path), SourceFile(path, kind, compression))
    return list(found.values())


def _expand(source: str, report: Report) -> Iterator[str]:
    source = os.path.expanduser(os.fspath(source))
    if os.path.isfile(source):
        if file_format(source) is None:
            raise UserError(
                f"the suffix of the source {source!r} is not known. Rename it: .txt for one "
                "document a file, .jsonl for one JSON object a line, .parquet for Parquet; "
                "the first two may end in .gz or .zst"
            )
        yield source
    elif os.path.isdir(source):
        yield from _walk(source, report)
    elif glob.has_magic(source):
        for path in sorted(glob.glob(source, recursive=True)):
            if os.path.isdir(path):
                # "**" already lists what is below; any other pattern means the folder itself.
                if "**" not in source:
                    yield from _walk(path, report)
            elif file_format(path) is not None:
                yield path


def _walk(folder: str, report: Report) -> Iterator[str]:
    def unreadable(e: OSError) -> None:
        report.add("unreadable", str(e.filename), 0, e.strerror or str(e))

    paths, visited = [], set()
    for root, folders, names in os.walk(folder, onerror=unreadable, followlinks=True):
        if os.path.realpath(root) in visited:  # a link that leads back
            folders.clear()
            continue
        visited.add(os.path.realpath(root))
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(root, name)
            # A broken link is kept, to be reported; a pipe or a device would block for ever.
            if not name.startswith(".") and (os.path.isfile(path) or not os.path.exists(path)):
                paths.append(path)
    # By parts, so that the order is that of a walk and does not depend on the separator's rank.
    yield from sorted(filter(file_format, paths), key=lambda p: pathlib.PurePath(p).parts)


def read_documents(
    sources: Iterable[SourceFile],
    text_field: str,
    report: Report,
    *,
    start: tuple[int, int] = (0, 0),
) -> Iterator[Document]:
    """Documents of `sources` (of `find_files`) in order; damage goes to `report`.

    `start` = (file, line) continues after that line of the file with that index, without reporting
    again what lies before. Texts are not deduplicated here.
    """
    for index, source in enumerate(sources):
        if index < start[0]:
            continue
        skip = start[1] if index == start[0] else 0
        yield from _read_file(source, text_field, report, skip)


def _read_file(source: SourceFile, field: str, report: Report, skip: int) -> Iterator[Document]:
    reader = {"text": _read_text, "lines": _read_lines, "parquet": _read_parquet}[source.kind]
    line = 0
    try:
        for line, value in reader(source, field, report, skip):
            if not value.strip():
                report.add("empty", source.path, line, "the text is empty or white space")
                continue
            try:
                digest = text_hash(value)
            except UnicodeEncodeError as e:
                report.add("invalid_utf8", source.path, line, f"not a Unicode text: {e.reason}")
                continue
            yield Document(value, source.path, line, digest)
    except (EOFError, zlib.error, zstandard.ZstdError) as e:
        report.add("truncated", source.path, line, f"after this line: {e}")
    except OSError as e:
        report.add("unreadable", source.path, line, e.strerror or str(e))


def _read_text(
    source: SourceFile, field: str, report: Report, skip: int
) -> Iterator[tuple[int, str]]:
    if skip:
        return
    data = b"".join(_chunks(source))
    try:
        yield 1, data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as e:
        report.add("invalid_utf8", source.path, 0, f"byte {e.start}: {e.reason}")


def _read_lines(
    source: SourceFile, field: str, report: Report, skip: int
) -> Iterator[tuple[int, str]]:
    for number, data in enumerate(_lines(_chunks(source)), start=1):
        if number <= skip or not data.strip():
            continue
        try:
            record = json.loads(data.decode("utf-8").removeprefix("\ufeff"))
        except UnicodeDecodeError as e:
            report.add("invalid_utf8", source.path, number, f"byte {e.start}: {e.reason}")
            continue
        except (ValueError, RecursionError) as e:
            report.add("broken_json", source.path, number, str(e))
            continue
        if not isinstance(record, dict):
            kind = type(record).__name__
            report.add("broken_json", source.path, number, f"a JSON object expected, found {kind}")
        elif not isinstance(record.get(field), str):
            reason = (
                f"{field!r} is {type(record[field]).__name__}"
                if field in record
                else (
                    f"no field {field!r}; the fields are {', '.join(map(repr, list(record)[:20]))}"
                )
            )
            report.add("no_text", source.path, number, reason)
        else:
            yield number, record[field]


def _read_parquet(
    source: SourceFile, field: str, report: Report, skip: int
) -> Iterator[tuple[int, str]]:
    import pyarrow  # slow to import and needed for this kind alone
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(source.path) as file:
            names = file.schema_arrow.names
            if field not in names:
                found = ", ".join(map(repr, names[:20]))
                report.add("no_text", source.path, 0, f"no column {field!r}; there are {found}")
                return
            for batch in file.iter_batches(_PARQUET_ROWS, columns=[field], use_threads=False):
                for scalar in batch.column(0):
                    number += 1
                    if number <= skip:
                        continue
                    try:
                        value = scalar.as_py()
                    except UnicodeDecodeError as e:
                        reason = f"byte {e.start}: {e.reason}"
                        report.add("invalid_utf8", source.path, number, reason)
                        continue
                    if isinstance(value, str):
                        yield number, value
                    else:
                        reason = f"{field!r} is {type(value).__name__}"
                        report.add("no_text", source.path, number, reason)
    except pyarrow.ArrowException as e:
        report.add("unreadable", source.path, number, str(e).splitlines()[0])


def _chunks(source: SourceFile) -> Iterator[bytes]:
    """The decompressed bytes; EOFError when a compressed stream ends early.

    One loop for both formats: concatenated members are read on, and truncation is an error (the
    stream reader of `zstandard` takes it for the end of the file).
    """
    with open(source.path, "rb") as f:
        stream: Any = None  # of zlib or zstandard
        while data := f.read(_READ_BYTES):
            if not source.compression:
                yield data
                continue
            while data:
                if stream is None:
                    data = data.lstrip(b"\0")  # padding after a member, as gzip itself allows
                    if not data:
                        break
                    if source.compression == ".gz":
                        stream = zlib.decompressobj(wbits=31)
                    else:
                        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)
                        stream = decompressor.decompressobj()
                yield stream.decompress(data)
                data = stream.unused_data if stream.eof else b""
                stream = None if stream.eof else stream
        if stream is not None:
            raise EOFError("the compressed data ends early")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their end, split at b"\\n" only; the last one may lack it."""
    parts: list[bytes] = []
    size = 0
    for chunk in chunks:
        *complete, rest = chunk.split(b"\n")
        for line in complete:
            yield b"".join([*parts, line])
            parts, size = [], 0
        parts.append(rest)
        size += len(rest)
        if size > MAX_LINE_BYTES:
            raise EOFError(f"a line is longer than {MAX_LINE_BYTES} bytes")
    if size:
        yield b"".join(parts)
