"""Source files to documents: find, read, report damage, deduplicate, split.

1. `find_files`     sources (files, folders, globs)  -> SourceFile, in a fixed order
2. `read_documents` SourceFile                       -> Document(text, source, line, hash)
3. `split_of`       hash                             -> "train", "validation" or "held_out"
4. `cut`            text                             -> pieces, if it is very long

Damage never stops the reading: every damaged line or file goes to a `Report` with its place and its
reason, and the reading goes on around it. `readers` reads a file. This module does not tokenise and
does not know domains.

Order: sources as given, inside a folder or glob by path; a file that two sources name is read once.
"""

import glob
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

from soup_jax import remote
from soup_jax import storage as files
from soup_jax.data.damage import Report
from soup_jax.data.readers import Document, Fields, SourceFile, read_file
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


def cut(text: str, max_chars: int) -> list[str]:
    """A document as what is embedded and assigned to a domain: whole, or pieces of `max_chars`."""
    return [text[i : i + max_chars] for i in range(0, max(len(text), 1), max_chars)]


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
    """The files of `sources`: each a file, a folder (searched recursively) or a glob (`**` too), on
    a file system or at a gs:// or s3:// address.

    Folders and globs take files with a known suffix and pass over hidden ones.

    Raises:
      UserError: no sources, one that matches nothing, a file named with an unknown suffix, or what
        is no regular file (a pipe or device, whose content can be read once or has no end).
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
        found_here = list(_expand(source, report))
        if not found_here:
            raise UserError(
                f"the source {source!r} matches no file that can be read as text; known are "
                ".txt, .md, .py and other text suffixes, .jsonl, .json.gz (one object a line), "
                "each also as .gz or .zst, and .parquet. Relative paths start at the working "
                f"folder, {os.getcwd()}"
            )
        for path, size, tag in found_here:
            kind, compression = file_format(path) or ("", "")
            key = path if tag else os.path.realpath(path)
            found.setdefault(key, SourceFile(path, kind, compression, size, tag))
    return list(found.values())


def _expand(source: str, report: Report) -> Iterator[remote.Found]:
    files.refuse_address(source, objects=True)
    if remote.is_object(source):
        found = remote.find(source)
        if len(found) == 1 and found[0].address == remote.spelled(source):
            _check_suffix(source)
            yield from found
            return
        place = remote.spelled(source)
        while remote.is_glob(place):
            place = place.rpartition("/")[0]
        for f in found:
            hidden = any(part.startswith(".") for part in f.address[len(place) :].split("/"))
            if file_format(f.address) and not hidden:
                yield f
        return
    for path in _local(os.path.expanduser(os.fspath(source)), report):
        yield remote.Found(path, os.path.getsize(path) if os.path.isfile(path) else 0, "")


def _check_suffix(source: str) -> None:
    if file_format(source) is None:
        raise UserError(
            f"the suffix of the source {source!r} is not known. Rename it: .txt for one "
            "document a file, .jsonl for one JSON object a line, .parquet for Parquet; "
            "the first two may end in .gz or .zst"
        )


def _local(source: str, report: Report) -> Iterator[str]:
    if os.path.isfile(source):
        _check_suffix(source)
        yield source
    elif os.path.isdir(source):
        yield from _walk(source, report)
    elif os.path.exists(source):
        raise UserError(
            f"the source {source!r} is a pipe or device, and sources are read more than once: "
            "write it into a file first"
        )
    elif glob.has_magic(source):
        for path in sorted(glob.glob(source, recursive=True)):
            if os.path.isdir(path):
                # "**" already lists what is below; any other pattern means the folder itself.
                if "**" not in source:
                    yield from _walk(path, report)
            elif file_format(path) is not None and _is_file(path):
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
            if not name.startswith(".") and _is_file(path):
                paths.append(path)
    # By parts, so that the order is that of a walk and does not depend on the separator's rank.
    yield from sorted(filter(file_format, paths), key=lambda p: pathlib.PurePath(p).parts)


def _is_file(path: str) -> bool:
    # A broken link is kept, to be reported; a pipe or a device would block for ever.
    return os.path.isfile(path) or not os.path.exists(path)


def read_documents(
    sources: Iterable[SourceFile],
    text_field: str,
    report: Report,
    *,
    domain_field: str = "",
    start: tuple[int, int] = (0, 0),
) -> Iterator[Document]:
    """Documents of `sources` (of `find_files`) in order; damage goes to `report`.

    With a `domain_field`, a record that names no domain there is damaged. `start` = (file, line)
    continues after that line of the file with that index, without reporting again what lies before.
    Texts are not deduplicated here.
    """
    fields = Fields(text_field, domain_field)
    for index, source in enumerate(sources):
        if index < start[0]:
            continue
        skip = start[1] if index == start[0] else 0
        yield from read_file(source, fields, report, skip)
