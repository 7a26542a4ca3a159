"""Runs that differ in the seed alone, as one; and the fields in which such groups differ."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from soup_jax.config.schema import FIELDS
from soup_jax.reports.runs import RunFiles

# Fields that no number of a run depends on still say what was scored.
_SCORED = ("specialists", "histogram_fraction", "tuning_fraction", "max_windows")
_TELLING = {f"evaluate.{name}" for name in _SCORED}
_CORPUS, _FINGERPRINT = "corpus", "corpus fingerprint"


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Group:
    """Runs of one config but for the seed.

    Attributes:
      label: tells the group from the others.
      fields: what its runs have in common, by name; "corpus" is its folder.
    """

    label: str
    fields: Mapping[str, Any]
    runs: Sequence[RunFiles]

    @property
    def seeds(self) -> list[Any]:
        """One for each run."""
        return [run.config.get("seed") for run in self.runs]

    @property
    def num_experts(self) -> int:
        """E; 0 for generic models."""
        return self.runs[0].config.get("num_experts", 0)


def group(runs: Sequence[RunFiles]) -> list[Group]:
    """The runs, those that differ in the seed alone together, in the order of the first of each."""
    found: dict[str, list[RunFiles]] = {}
    for run in runs:
        found.setdefault(repr(sorted(_fields(run).items())), []).append(run)
    members = list(found.values())
    fields = [_named(_fields(each[0]), each[0]) for each in members]
    labels = _labels([each[0] for each in members], fields)
    return [
        Group(label=label, fields=each, runs=sorted(own, key=_seed))
        for label, each, own in zip(labels, fields, members)
    ]


def _seed(run: RunFiles) -> tuple[int, int]:
    seed = run.config.get("seed")
    return (0, seed) if isinstance(seed, int) else (1, 0)


def _fields(run: RunFiles) -> dict[str, Any]:
    kept = {
        name: value
        for name, value in run.config.items()
        if name not in FIELDS or FIELDS[name].change != "free" or name in _TELLING
    }
    kept.pop("seed", None)
    kept[_CORPUS] = run.fingerprint or run.config.get("corpus.dir")
    for change in run.changes:
        name = f"{change['field']} from step {change['step']}"
        kept[name] = change.get("new")
    return kept


def _named(fields: Mapping[str, Any], run: RunFiles) -> dict[str, Any]:
    # For people, a corpus is its folder; levels of one corpus are in one folder.
    folder = str(run.config.get("corpus.dir", "")).rstrip("/").rpartition("/")[2]
    return {**fields, _CORPUS: folder, _FINGERPRINT: str(fields[_CORPUS])[:8]}


def differing(fields: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names whose values are not all the same, in the order of the schema."""
    names = dict.fromkeys([*FIELDS, *(name for each in fields for name in each)])
    return [n for n in names if len({repr(each.get(n, _MISSING)) for each in fields}) > 1]


_MISSING = object()


def _labels(runs: Sequence[RunFiles], fields: Sequence[Mapping[str, Any]]) -> list[str]:
    # As few fields as tell the groups apart; the page lists all that differ.
    names = [str(run.config.get("name") or run.name) for run in runs]
    if len(runs) == 1:
        return names
    shown = names if len(set(names)) > 1 else [""] * len(runs)
    labels, left = list(shown), differing(fields)
    while left and len(set(labels)) < len(labels):
        # What a config says tells more than which corpus it was, and a hash the least.
        tried = {name: _with(labels, name, fields) for name in left}
        better = [name for name in left if len(set(tried[name])) > len(set(labels))]
        if not better:
            break
        plain = [name for name in better if name != _FINGERPRINT] or better
        best = max(plain, key=lambda name: (len(set(tried[name])), name != _CORPUS))
        labels = tried[best]
        left.remove(best)
    if len(set(labels)) < len(labels):
        labels = [f"{label} {run.name}".strip() for label, run in zip(labels, runs)]
    if len(set(labels)) < len(labels):
        labels = [f"{label} {run.place}" for label, run in zip(labels, runs)]
    return [label or name for label, name in zip(labels, names)]


def _with(labels: Sequence[str], name: str, fields: Sequence[Mapping[str, Any]]) -> list[str]:
    short = name.removeprefix("optimizer.").removeprefix("domain_weights.")
    added = [f"{short}={value_text(each.get(name, '-'))}" for each in fields]
    return [", ".join(filter(None, pair)) for pair in zip(labels, added)]


def value_text(value: Any) -> str:
    """A value of a field in few characters: 0.009, where arithmetic left 0.009000000000000001."""
    text = value if isinstance(value, str) else repr(value)
    if isinstance(value, float) and len(text) > 12:
        text = f"{value:.10g}"
    return text if len(text) <= 80 else f"{text[:77]}..."
