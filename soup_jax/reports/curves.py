"""Curves of groups over steps: mean over seeds, smallest and largest, few enough points to draw.

Nothing is smoothed: a line of metrics.jsonl is the mean over the steps since the line before.
"""

import bisect
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from soup_jax.reports.groups import Group
from soup_jax.reports.runs import RunFiles

# Points of a curve, two for each of at most so many stretches of steps; with many groups fewer,
# so that the page stays small.
_STRETCHES, _ALL_STRETCHES, _FEWEST = 150, 1500, 40
_MARKS = 20  # of places that are not finite

Line = Mapping[str, Any]
_PER_TOKEN = "nats per token"


def _at(*path: str) -> Callable[[Line], Any]:
    def value(line: Any) -> Any:
        for name in path:
            line = line.get(name) if isinstance(line, Mapping) else None
        # `evaluate` writes null for what is not finite; metrics.jsonl has NaN itself.
        return line if isinstance(line, int | float) and not isinstance(line, bool) else None

    return value


def _gain(line: Line) -> float | None:
    ours = _at("average", "specialist", "loss")(line)
    generic = _at("average", "generic_h", "loss")(line)
    return None if ours is None or generic is None else generic - ours


# (id, title, unit, kind of line, only with experts, {series: value}); the second series is dashed.
CHARTS: tuple[tuple[str, str, str, str, bool, dict[str, Callable[[Line], Any]]], ...] = (
    ("loss", "Training loss", _PER_TOKEN, "train", False, {"": _at("loss")}),
    (
        "validation",
        "Validation loss at the natural frequencies",
        _PER_TOKEN,
        "evaluation",
        False,
        {"": _at("generic_validation", "generic_h", "loss")},
    ),
    (
        "specialists",
        "Specialist sets, average",
        _PER_TOKEN,
        "evaluation",
        False,
        {
            "specialist": _at("average", "specialist", "loss"),
            "generic_h": _at("average", "generic_h", "loss"),
        },
    ),
    ("gain", "Gain of specialists over generic_h", _PER_TOKEN, "evaluation", True, {"": _gain}),
    ("learning_rate", "Learning rate", "", "train", False, {"": _at("learning_rate")}),
    ("grad_norm", "Gradient norm", "mean before clipping", "train", False, {"": _at("grad_norm")}),
    ("alpha_l1", "Coefficients of the experts", "L1 norm of alpha", "train", True,
     {"": _at("alpha_l1")}),
    ("speed", "Speed", "tokens per second", "train", False, {"": _at("tokens_per_second")}),
)  # fmt: skip


def hours(run: RunFiles) -> dict[int, float]:
    """Step -> hours of training until then, by the step times; evaluations are not in them."""
    found, total, before = {}, 0.0, 0
    for line in run.train:
        steps = line.get("steps", line["step"] - before)
        step_ms = _at("step_ms")(line)
        total += steps * (step_ms if step_ms and math.isfinite(step_ms) else 0.0) / 3.6e6
        found[line["step"]], before = total, line["step"]
    return found


def tokens_per_step(run: RunFiles) -> int:
    """Targets that a step predicts, padding included; 0: not known."""
    values = (run.config.get("batch_size"), run.config.get("seq_len"))
    return math.prod(v for v in values if isinstance(v, int)) if None not in values else 0


def curves(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """The charts, each with its curves: {"group", "series", "dashed", "step", "hours", "mean"} and,
    of several seeds, "low", "high" and "runs"; "marks" are steps with a value that is not finite.
    """
    stretches = max(_FEWEST, min(_STRETCHES, _ALL_STRETCHES // max(len(groups), 1)))
    clocks = [[hours(run) for run in group.runs] for group in groups]
    charts = []
    for name, title, unit, kind, experts_only, series in CHARTS:
        found = []
        for number, (group, clock) in enumerate(zip(groups, clocks)):
            if experts_only and not group.num_experts:
                continue
            for place, (label, value) in enumerate(series.items()):
                if place and not group.num_experts:  # one model: the same line
                    continue
                curve = _curve(group, clock, kind, value, stretches)
                if curve["step"] or curve["marks"]:
                    found.append({"group": number, "series": label, "dashed": place > 0, **curve})
        charts.append({"id": name, "title": title, "unit": unit, "curves": found})
    return charts


def _curve(
    group: Group,
    clocks: Sequence[Mapping[int, float]],
    kind: str,
    value: Callable[[Line], Any],
    stretches: int,
) -> dict[str, Any]:
    values: dict[int, list[float]] = {}
    times: dict[int, list[float]] = {}
    marks = set()
    for run, clock in zip(group.runs, clocks):
        known = sorted(clock)
        for line in run.train if kind == "train" else run.evaluations:
            number, step = value(line), line["step"]
            if number is None:
                continue
            if not math.isfinite(number):
                marks.add(step)
                continue
            values.setdefault(step, []).append(number)
            until = bisect.bisect_right(known, step)
            times.setdefault(step, []).append(clock[known[until - 1]] if until else 0.0)
    steps = sorted(values)
    low, high = [min(values[s]) for s in steps], [max(values[s]) for s in steps]
    chosen = thinned(low, high, stretches)
    steps = [steps[i] for i in chosen]
    curve: dict[str, Any] = {
        "step": steps,
        "hours": [statistics.fmean(times[s]) for s in steps],
        "mean": [statistics.fmean(values[s]) for s in steps],
        "marks": sorted(marks)[:_MARKS],
    }
    if len(group.runs) > 1:
        curve["low"], curve["high"] = [low[i] for i in chosen], [high[i] for i in chosen]
        curve["runs"] = [len(values[s]) for s in steps]
    return curve


def thinned(low: Sequence[float], high: Sequence[float], stretches: int) -> list[int]:
    """Indices of points to draw: of each stretch its smallest `low` and its largest `high`, and the
    first and the last of all. All, if they are few."""
    count = len(low)
    if count <= 2 * stretches:
        return list(range(count))
    kept = {0, count - 1}
    for i in range(stretches):
        stretch = range(i * count // stretches, (i + 1) * count // stretches)
        kept |= {min(stretch, key=low.__getitem__), max(stretch, key=high.__getitem__)}
    return sorted(kept)
