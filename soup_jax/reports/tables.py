"""What a report says in tables: specialists, coefficients, domains, runs, and their configs."""

import math
import shlex
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soup_jax.config.schema import FIELDS
from soup_jax.data.domains import gini
from soup_jax.reports.groups import Group, differing, value_text
from soup_jax.reports.runs import Evaluation, RunFiles

COLUMNS = ("specialist", "generic_h", "shared")
_METRICS = ("loss", "bits_per_byte")
MAX_DOMAINS = 500  # lines of the table, the largest
_LAST = 0.1  # of a run's lines, over which its domains' losses are averaged


def specialists(groups: Sequence[Group]) -> dict[str, Any]:
    """Rows of the evaluations, one for each group and specialist, and an average for each group.

    A number is [mean, smallest, largest] over the runs of the group. A gain is the other column's
    loss minus the specialist's, of each run by itself.
    """
    rows, averages, sources = [], [], []
    columns: dict[str, None] = {}
    for number, group in enumerate(groups):
        found = _of_one_part(group)
        if not found:
            continue
        results = [_renamed(e) for _, e in found]
        sources.append({"group": number, **_source(group, found)})
        names = dict.fromkeys(name for r in results for name in r["specialists"])
        for name in names:
            own = [r["specialists"][name] for r in results if name in r["specialists"]]
            row = {"group": number, "name": name, **_summary(own, columns)}
            for count in ("tokens", "documents_in_training"):
                row[count] = next((o[count] for o in own if o.get(count) is not None), None)
            rows.append(row)
        average = [r["average"] for r in results]
        averages.append({"group": number, "name": "average", **_summary(average, columns)})
    others = [c for c in columns if c not in COLUMNS]
    known = [*(c for c in COLUMNS if c in columns), *others]
    return {"columns": known, "rows": rows, "averages": averages, "sources": sources}


def _of_one_part(group: Group) -> list[tuple[RunFiles, Evaluation]]:
    # Seeds are averaged over the same documents only: the best part that any of them has.
    found = [(run, run.evaluation) for run in group.runs if run.evaluation is not None]
    if not found:
        return []
    sources = ("evaluation.json", "evaluation_tuning.json")
    best = min(
        (e.source for _, e in found),
        key=lambda s: sources.index(s) if s in sources else len(sources),
    )
    return [(run, e) for run, e in found if e.source == best]


def _source(group: Group, found: Sequence[tuple[RunFiles, Evaluation]]) -> dict[str, Any]:
    steps = sorted({e.step for _, e in found if e.step is not None})
    older = [r.name for r, e in found if e.step is not None and e.step < r.step]
    return {
        "file": found[0][1].source,
        "part": found[0][1].part,
        "steps": steps,
        "runs": len(found),
        "all": len(group.runs),
        "older": older,
        "commands": sorted({shlex.join(c) for _, e in found if (c := e.result.get("command"))}),
    }


def _renamed(evaluation: Evaluation) -> dict[str, Any]:
    # A run that is compared with is a column named like its folder, and so by its seed: by the name
    # of its config instead, where that tells the columns apart.
    result = evaluation.result
    runs = {c: r for c, r in result.get("runs", {}).items() if c != "specialist"}
    names = {c: str(r.get("name") or c) for c, r in runs.items()}
    clear = len(set(names.values()) | set(COLUMNS)) == len(names) + len(COLUMNS)
    names = names if clear else {}

    def renamed(row: Mapping[str, Any]) -> dict[str, Any]:
        return {names.get(c, c): v for c, v in row.items()}

    rows = {name: renamed(row) for name, row in result["specialists"].items()}
    return {"specialists": rows, "average": renamed(result["average"])}


def _summary(rows: Sequence[Mapping[str, Any]], columns: dict[str, None]) -> dict[str, Any]:
    losses = [
        {c: v for c, v in row.items() if isinstance(v, Mapping) and "loss" in v} for row in rows
    ]
    here = dict.fromkeys(c for row in losses for c in row)
    columns.update(here)
    summary: dict[str, Any] = {}
    for metric in _METRICS:
        summary[metric], summary[f"{metric}_gain"] = {}, {}
        for column in here:
            own = [row for row in losses if column in row]
            summary[metric][column] = spread([_number(row[column].get(metric)) for row in own])
            if column != "specialist" and all("specialist" in row for row in own):
                gains = [
                    _number(row[column].get(metric)) - _number(row["specialist"].get(metric))
                    for row in own
                ]
                summary[f"{metric}_gain"][column] = spread(gains)
    return summary


def _number(value: Any) -> float:
    # JSON has null for what was not finite.
    return float(value) if isinstance(value, int | float) else math.nan


def spread(values: Sequence[float]) -> list[float]:
    """[mean, smallest, largest]; all are NaN if one of the values is."""
    if not all(map(math.isfinite, values)):
        return [math.nan] * 3
    return [statistics.fmean(values), min(values), max(values)]


def coefficients(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each run whose evaluation kept them: alpha of its specialists."""
    found = []
    for number, group in enumerate(groups):
        for run in group.runs:
            rows = run.evaluation.result["specialists"] if run.evaluation else {}
            alpha = {
                name: [a if a is None else round(a, 4) for a in row["alpha"]]
                for name, row in rows.items()
                if _are_numbers(row.get("alpha"))
            }
            if alpha:
                found.append({"group": number, "run": run.name, "alpha": alpha})
    return found


def _are_numbers(values: Any) -> bool:
    if not isinstance(values, list) or not values:
        return False
    return all(a is None or isinstance(a, int | float) for a in values)


def domains(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """For each corpus its domains, the largest first, and how each group met them."""
    corpora: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        if group.runs[0].domains:
            key = group.runs[0].fingerprint or str(number)
            corpora.setdefault(f"{key} {len(group.runs[0].domains)}", []).append(number)
    found = []
    for numbers in corpora.values():
        entries = groups[numbers[0]].runs[0].domains
        windows = [entry["windows"]["train"] for entry in entries]
        order = sorted(range(len(entries)), key=lambda k: (-windows[k], k))[:MAX_DOMAINS]
        total = max(sum(windows), 1)
        rows = [
            {
                "domain": k,
                "label": entries[k]["label"],
                "terms": entries[k].get("terms", [])[:10],
                "documents": _train(entries[k], "documents"),
                "tokens": _train(entries[k], "tokens"),
                "windows": windows[k],
                "share": windows[k] / total,
            }
            for k in order
        ]
        met = [_met(groups[n], order, windows, number=n) for n in numbers]
        found.append(
            {"count": len(entries), "gini": gini(np.asarray(windows)), "rows": rows, "met": met}
        )
    return found


def _train(entry: Mapping[str, Any], name: str) -> int | None:
    value = entry.get(name)
    return value.get("train") if isinstance(value, Mapping) else None


def _met(
    group: Group, order: Sequence[int], windows: Sequence[int], *, number: int
) -> dict[str, Any]:
    # Times that each window was seen, by the mean over the runs; the loss at the end.
    seen, sums, counts = ([0.0] * len(windows) for _ in range(3))
    for run in group.runs:
        tail = run.train[-max(math.ceil(len(run.train) * _LAST), 1) :]
        for lines, last in ((run.train, False), (tail, True)):
            for line in lines:
                for k, (rows, loss) in _of_line(line, len(windows)):
                    if not last:
                        seen[k] += rows
                    elif math.isfinite(loss):
                        sums[k] += rows * loss
                        counts[k] += rows
    return {
        "group": number,
        "epochs": [seen[k] / len(group.runs) / max(windows[k], 1) for k in order],
        "loss": [sums[k] / counts[k] if counts[k] else None for k in order],
    }


def _of_line(line: Mapping[str, Any], count: int) -> list[tuple[int, tuple[float, float]]]:
    found = line.get("domains")
    if not isinstance(found, Mapping):
        return []
    return [(int(k), (v[0], v[1])) for k, v in found.items() if k.isdecimal() and int(k) < count]


def configs(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The fields that differ from their default in one of the runs, with each group's value."""
    different = set(differing([group.fields for group in groups]))
    rows = []
    for name, field in FIELDS.items():
        if name == "seed":
            values = [", ".join(map(str, group.seeds)) for group in groups]
        else:
            values = [_common(group, name) for group in groups]
        default = value_text(field.default)
        if name == "seed" or any(v != default for v in values):
            rows.append(
                {
                    "name": name,
                    "meaning": field.meaning,
                    "default": default,
                    "values": values,
                    "differs": len(set(values)) > 1,
                }
            )
    for name in sorted(different - FIELDS.keys()):
        values = [value_text(group.fields.get(name, "-")) for group in groups]
        rows.append({"name": name, "meaning": "", "default": "", "values": values, "differs": True})
    return rows


def _common(group: Group, name: str) -> str:
    found = dict.fromkeys(value_text(run.config.get(name, "-")) for run in group.runs)
    return ", ".join(found)
