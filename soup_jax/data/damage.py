"""What is wrong with sources: kinds of damage, and the report that counts and lists it."""

from collections.abc import Sequence
from typing import Any

# What can be wrong with a line or a file, in the order of the summary.
DAMAGE = {
    "broken_json": "lines that are not a JSON object",
    "no_text": "records without a text (field missing or not a string)",
    "no_domain": "records that name no domain (field missing, or neither a number nor a name)",
    "empty": "empty documents",
    "invalid_utf8": "lines or files that are not UTF-8",
    "too_large": "lines or files that are too large for a document",
    "truncated": "files that end or break in the middle (what came before was read)",
    "unreadable": "files or folders that cannot be read",
}
# What `Report.to_json` returns. An entry may have a "field", where its text seems to be.
REPORT = {
    "counts": {...: int},
    "entries": {...: [{"source": str, "line": int, "reason": str}]},
}
MAX_ENTRIES = 1000  # damage listed one by one, per kind; all of it is counted


class Report:
    """Damage found while reading: all of it counted, the first MAX_ENTRIES of a kind listed."""

    def __init__(self, value: dict[str, Any] | None = None):
        """Empty, or from what `to_json` returned."""
        value = value or {}
        self.counts: dict[str, int] = dict(value.get("counts", {}))
        self.entries: dict[str, list[dict[str, Any]]] = {
            kind: list(entries) for kind, entries in value.get("entries", {}).items()
        }

    def add(self, kind: str, source: str, line: int, reason: str, *, field: str = "") -> None:
        """Record one damaged line (0: the file itself).

        Args:
          kind: a key of DAMAGE.
          field: the one that seems to hold the text instead; empty if none does.
        """
        assert kind in DAMAGE, kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        entries = self.entries.setdefault(kind, [])
        if len(entries) < MAX_ENTRIES:
            entry = {"source": source, "line": line, "reason": reason}
            entries.append(entry | ({"field": field} if field else {}))

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
                line = f"{self.counts[kind]} {meaning}; first {place}: {first['reason']}"
                result.append(shown(line))
        return result

    def text_field(self) -> str:
        """The field where the first record without a text seems to have it; empty if unknown."""
        entries = self.entries.get("no_text", [])
        return next((entry["field"] for entry in entries if "field" in entry), "")


def shown(text: str) -> str:
    """A text, perhaps with a path in it, as any UTF-8 output takes it.

    The name of a file is bytes; Python spells those that are no UTF-8 as lone surrogates.
    """
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def listed(values: Sequence[str], *, most: int = 20) -> str:
    """Names for a message: in quotes, the first `most` of them, none of them long; or "none"."""
    if not values:
        return "none"
    names = [repr(v if len(v) <= 50 else v[:50] + "...") for v in values[:most]]
    return ", ".join(names) + (f" and {len(values) - most} more" if len(values) > most else "")
