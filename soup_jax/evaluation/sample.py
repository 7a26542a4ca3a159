"""The documents that a specialist is made from, or scored on: a sample, which fits the memory."""

import collections
import dataclasses
from collections.abc import Sequence

from soup_jax.data.damage import Report, shown
from soup_jax.data.readers import Document
from soup_jax.data.sources import find_files, read_documents
from soup_jax.errors import UserError

# Of text, before exact duplicates are dropped or after: no histogram needs as much, and all of it
# is held.
MAX_SAMPLE_BYTES = 256 << 20
# One document longer than this is taken for a collection that was not cut into documents.
LONG_CHARS = 5_000
_LISTED_FILES = 10


@dataclasses.dataclass(frozen=True)
class Sample:
    """Documents of one specialist.

    Attributes:
      documents: in order, without exact duplicates.
      files: path and number of documents in it, duplicates too, of every file that was read.
      num_duplicates: how many were dropped.
      damage: lines on what could not be read.
    """

    documents: list[Document]
    files: list[tuple[str, int]]
    num_duplicates: int
    damage: list[str]

    def summary(self) -> list[str]:
        """Lines for the user: which files were read, and what was in them."""
        lines = []
        for path, count in self.files[:_LISTED_FILES]:
            lines.append(f"read {shown(path)}: {_documents(count)}")
        if len(self.files) > _LISTED_FILES:
            rest = sum(count for _, count in self.files[_LISTED_FILES:])
            num = len(self.files) - _LISTED_FILES
            lines.append(f"read {num} more files: {_documents(rest)}")
        if len(self.files) > 1:
            lines.append(f"one specialist of {len(self.files)} files")
        if self.num_duplicates:
            lines.append(f"{self.num_duplicates} exact duplicates dropped")
        return lines

    def warnings(self) -> list[str]:
        """What is probably a mistake; empty if nothing is."""
        if len(self.documents) == 1 and len(self.documents[0].text) > LONG_CHARS:
            only = self.documents[0]
            return [
                f"{shown(only.source)} is one document of {len(only.text):,} characters. If it is "
                'many, write them to a .jsonl, a line {"text": "..."} for each, or to a file each '
                "in a folder"
            ]
        return []


def _documents(count: int) -> str:
    return f"{count} document" + ("" if count == 1 else "s")


def read_sample(sources: Sequence[str], *, text_field: str) -> Sample:
    """Read files, folders or globs as the documents of one specialist.

    Args:
      text_field: of a JSON line or Parquet row.

    Raises:
      UserError: no document could be read, or they have more than MAX_SAMPLE_BYTES of text.
    """
    report = Report()
    files = find_files(sources, report)
    counts = collections.Counter({file.path: 0 for file in files})
    documents: dict[bytes, Document] = {}
    size = 0
    for document in read_documents(files, text_field, report):
        counts[document.source] += 1
        if document.hash in documents:
            continue
        documents[document.hash] = document
        size += len(document.text.encode())
        if size > MAX_SAMPLE_BYTES:
            raise UserError(
                f"{_names(sources)} has more than {MAX_SAMPLE_BYTES >> 20} MB of text: a "
                "specialist needs a sample. Take a part, such as `shuf -n 1000 FILE.jsonl`"
            )
    if not documents:
        raise UserError(_nothing(sources, report, text_field))
    num_duplicates = counts.total() - len(documents)
    return Sample(list(documents.values()), list(counts.items()), num_duplicates, report.lines())


def _names(sources: Sequence[str]) -> str:
    return shown(", ".join(sources))


def _nothing(sources: Sequence[str], report: Report, text_field: str) -> str:
    reasons = report.lines() or ["there is nothing in it"]
    if field := report.text_field():
        reasons.append(
            f"the run's corpus.text_field is {text_field!r}: if {field!r} holds the text, rename "
            f"it, `jq -c '{{{text_field}: .{field}}}' FILE > NEW`"
        )
    return f"{_names(sources)} holds no readable document: {'. '.join(reasons)}"
