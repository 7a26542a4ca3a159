"""What came of a sweep: how each point ended, a table, a picture, the best point as a command."""

import dataclasses
import math
import pathlib
import statistics
import types
from collections.abc import Mapping, Sequence
from typing import Any

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.config.schema import FIELDS
from soup_jax.errors import UserError, explain
from soup_jax.sweeps.points import Point, Sweep, spelled
from soup_jax.training import metrics

# In the order in which the first that all finished points have decides.
METRICS = ("specialist", "validation", "loss", "generic_h", "shared")
_SHOWN = ("loss", "validation", "specialist", "generic_h", "shared")
_MAX_PANELS = 5
SCORE = "evaluation_tuning.json"
_SCORE = {"runs": {"specialist": {"step": int}}}
_OUTCOME = {"state": str, "seconds": float, "error": str, "scoring?": str}


@dataclasses.dataclass(frozen=True)
class Row:
    """One point as it stands.

    Attributes:
      state: done, failed, unfinished (it has begun, and goes on) or waiting.
      numbers: nats per token; `loss` of the last line of metrics, the others of the documents
        `tuning` of the specialists and of the validation text.
      seconds: of all starts that came to an end.
      error: why it failed, in a line; of one that is done: why its evaluation did.
    """

    point: Point
    state: str
    numbers: dict[str, float]
    seconds: float
    error: str


def record(
    folder: pathlib.Path, *, state: str, seconds: float, error: str = "", scoring: str = ""
) -> None:
    """Write how a point ended.

    Args:
      seconds: added to those of earlier starts.
      error: why it, or its evaluation, failed.
      scoring: `work.scoring` of its score, if it has one.
    """
    seconds += outcome(folder)["seconds"]
    value = {"state": state, "seconds": seconds, "error": error, "scoring": scoring}
    files.write_json(folder / "outcome.json", value)


def outcome(folder: pathlib.Path) -> dict[str, Any]:
    """How a point ended: its `state`, which is "" while it has not, and what `record` takes.

    Raises:
      UserError: the file is damaged.
    """
    path = folder / "outcome.json"
    nothing = {"state": "", "seconds": 0.0, "error": "", "scoring": ""}
    return nothing | (inputs.read_json(path, _OUTCOME) if path.exists() else {})


def rows(
    sweep: Sweep, workdir: pathlib.Path, errors: Mapping[str, str] = types.MappingProxyType({})
) -> list[Row]:
    """All points of the sweep, in its order; `errors` has why points failed that no file tells."""
    found = []
    for point in sweep.points:
        folder = workdir / point.name
        try:
            if point.name in errors:
                raise UserError(errors[point.name])
            ended = outcome(folder)
        except UserError as e:
            found.append(Row(point, "failed", {}, 0.0, str(e)))
            continue
        started = (folder / "metrics.jsonl").exists()
        state = ended["state"] or ("unfinished" if started else "waiting")
        # A score by other documents or settings is not comparable with those beside it.
        scored = ended["scoring"] == sweep.scoring.get(point.name, "")
        numbers = _numbers(folder, scored=scored) if state == "done" else {}
        found.append(Row(point, state, numbers, ended["seconds"], ended["error"]))
    return found


def _numbers(folder: pathlib.Path, *, scored: bool) -> dict[str, float]:
    path = folder / "metrics.jsonl"
    lines, evaluations = metrics.read_metrics(path), metrics.read_metrics(path, kind="evaluation")
    numbers = {"loss": lines[-1]["loss"]} if lines else {}
    result = (_score(folder) if scored else {}) or (evaluations or [{}])[-1]
    averages = result.get("average", {})
    found = {name: averages.get(name, {}).get("loss") for name in METRICS}
    found["validation"] = result.get("generic_validation", {}).get("generic_h", {}).get("loss")
    return numbers | {name: x for name, x in found.items() if x is not None}


def _score(folder: pathlib.Path) -> dict[str, Any]:
    # What `evaluate` found at the end of the run; one of a step before it is no score of the point.
    config = folder / "config.json"
    if not config.exists() or (step := scored_step(folder)) is None:
        return {}
    at_end = step == inputs.read_json(config, {"num_steps": int})["num_steps"]
    return inputs.read_json(folder / SCORE, {}) if at_end else {}


def scored_step(folder: pathlib.Path) -> int | None:
    """The step whose parameters `evaluate --part=tuning` has scored; None: it has not.

    Raises:
      UserError: its file is damaged.
    """
    path = folder / SCORE
    if not path.exists():
        return None
    step: int = inputs.read_json(path, _SCORE)["runs"]["specialist"]["step"]
    return step


def choose_metric(rows: Sequence[Row], wanted: str = "") -> str:
    """The metric that decides: the one that is wanted, or the first that all finished points have.

    Raises:
      UserError: no finished point has the one that is wanted.
    """
    done = [row for row in rows if row.state == "done"]
    if wanted:
        if done and not any(wanted in row.numbers for row in done):
            raise UserError(
                f"--metric={wanted}: no point has it; --evaluate scores all finished ones"
            )
        return wanted
    return next((m for m in METRICS if all(m in row.numbers for row in done)), "loss")


def ranked(rows: Sequence[Row], metric: str) -> list[Row]:
    """Best first; points without that number last, in their order."""
    return sorted(rows, key=lambda row: _rank(row.numbers.get(metric, math.inf)))


def _rank(number: float) -> float:
    return number if math.isfinite(number) else math.inf


@dataclasses.dataclass(frozen=True)
class Group:
    """Finished points that differ in the seed alone.

    Attributes:
      overrides: those that they share.
      values: their numbers of the metric.
    """

    overrides: dict[str, Any]
    values: list[float]

    @property
    def mean(self) -> float:
        """Of the values."""
        return statistics.fmean(self.values)


def over_seeds(rows: Sequence[Row], metric: str) -> list[Group]:
    """Groups by all fields but the seed, best mean first; () unless a group has several seeds.

    Those with fewer seeds than others come last: their means are not comparable.
    """
    groups: dict[str, Group] = {}
    for row in rows:
        value = row.numbers.get(metric, math.nan)
        if row.state == "done" and math.isfinite(value):
            rest = _without_seed(row)
            groups.setdefault(repr(rest), Group(rest, [])).values.append(value)
    if all(len(group.values) == 1 for group in groups.values()):
        return []
    return sorted(groups.values(), key=lambda group: (-len(group.values), group.mean))


def _without_seed(row: Row) -> dict[str, Any]:
    return {name: x for name, x in row.point.overrides.items() if name != "seed"}


def best(rows: Sequence[Row], metric: str) -> Row | None:
    """The point with the lowest number, of the best group where there are several seeds."""
    groups = over_seeds(rows, metric)
    found = [r for r in ranked(rows, metric) if math.isfinite(r.numbers.get(metric, math.nan))]
    if groups:
        found = [row for row in found if _without_seed(row) == groups[0].overrides]
    return found[0] if found else None


def command(sweep: Sweep, point: Point, workdir: pathlib.Path) -> list[str]:
    """The words of a command that trains a point's config anew, beside the sweep."""
    return ["soup-jax", "train", *sweep.train, *point.arguments, f"--workdir={workdir}-best"]


def columns(sweep: Sweep) -> dict[str, str]:
    """Fields that points set -> their names in the table, without the section where that is
    clear."""
    fields = list(dict.fromkeys(name for point in sweep.points for name in point.overrides))
    short = [name.rpartition(".")[2] for name in fields]
    return {f: s if short.count(s) == 1 else f for f, s in zip(fields, short)}


def text(rows: Sequence[Row], names: dict[str, str], metric: str) -> str:
    """The table, a line per point, best first; below it the means over seeds, where there are."""
    shown = [m for m in _SHOWN if any(m in row.numbers for row in rows)]
    lines = [[*names.values(), *(f"{m}*" if m == metric else m for m in shown), "time", ""]]
    for row in ranked(rows, metric):
        cells = [spelled(row.point.overrides[f]) if f in row.point.overrides else "" for f in names]
        cells += [f"{row.numbers[m]:.4f}" if m in row.numbers else "" for m in shown]
        state = row.state if row.state != "done" else "evaluation failed" if row.error else ""
        lines.append([*cells, _time(row.seconds), state])
    parts = [_aligned(lines), f"(nats per token; lower is better; by {metric})"]
    if groups := over_seeds(rows, metric):
        rest = {field: name for field, name in names.items() if field != "seed"}
        lines = [[*rest.values(), "mean", "std", "seeds"]]
        for group in groups:
            several = len(group.values) > 1
            lines.append(
                [spelled(group.overrides[f]) if f in group.overrides else "" for f in rest]
                + [f"{group.mean:.4f}"]
                + [f"{statistics.stdev(group.values):.4f}" if several else ""]
                + [str(len(group.values))]
            )
        parts += ["", f"{metric} over seeds:", _aligned(lines)]
    return "\n".join(parts)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def _aligned(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(line, widths)).rstrip() for line in lines)


def write_tsv(rows: Sequence[Row], names: dict[str, str], metric: str, path: pathlib.Path) -> None:
    """All points and numbers, best first, for other programs; fields by their whole names."""
    lines = [["point", *names, "state", *_SHOWN, "seconds", "error"]]
    for row in ranked(rows, metric):
        cells = [spelled(row.point.overrides[f]) if f in row.point.overrides else "" for f in names]
        numbers = [repr(row.numbers[m]) if m in row.numbers else "" for m in _SHOWN]
        ends = [f"{row.seconds:.1f}", row.error]
        lines.append([row.point.name, *cells, row.state, *numbers, *ends])
    clean = ["\t".join(" ".join(cell.split()) for cell in line) for line in lines]
    files.write_text(path, "\n".join(clean) + "\n")


def draw(
    rows: Sequence[Row], names: dict[str, str], metric: str, workdir: pathlib.Path
) -> pathlib.Path:
    """Draw the training losses of all points, and the metric along each field; returns the PNG."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    rows = [row for row in ranked(rows, metric) if row.state == "done"]
    fields = [f for f in names if len({repr(r.point.overrides.get(f)) for r in rows}) > 1]
    fields = ([f for f in fields if f != "seed"] or fields)[:_MAX_PANELS]
    size = (4.4 * (1 + len(fields)), 4.2)
    figure, panels = plt.subplots(
        1, 1 + len(fields), figsize=size, layout="constrained", squeeze=False
    )
    curves, *others = panels[0]
    for place, row in enumerate(rows):
        lines = metrics.read_metrics(workdir / row.point.name / "metrics.jsonl")
        colour = plt.get_cmap("viridis")(place / max(len(rows) - 1, 1))
        curves.plot(
            [line["tokens"] / 1e6 for line in lines], [line["loss"] for line in lines], color=colour
        )
    curves.set(xlabel="million tokens", ylabel="nats per token", title="training, best is darkest")
    for axes, field in zip(others, fields):
        _draw_field(axes, rows, field, metric)
        axes.set(xlabel=field, title=f"{metric}: points, and the mean")
    for axes in panels[0]:
        axes.grid(alpha=0.3)
    out = workdir / "sweep.png"
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return out


def _draw_field(axes: Any, rows: Sequence[Row], field: str, metric: str) -> None:
    found = [r for r in rows if field in r.point.overrides and metric in r.numbers]
    values = list(dict.fromkeys(row.point.overrides[field] for row in found))
    numeric = type(FIELDS[field].default) in (int, float)
    values = sorted(values) if numeric else sorted(values, key=repr)
    spread = numeric and min(values, default=0) > 0 and max(values) >= 8 * min(values)
    places = values if numeric else list(range(len(values)))
    numbers = [[r.numbers[metric] for r in found if r.point.overrides[field] == v] for v in values]
    for x, column in zip(places, numbers):
        axes.plot([x] * len(column), column, "o", color="tab:blue", alpha=0.6)
    axes.plot(places, [statistics.fmean(column) for column in numbers], color="tab:orange")
    if spread:
        axes.set_xscale("log")
    if not numeric:
        axes.set_xticks(places, [spelled(v)[:20] for v in values], rotation=30, ha="right")


def drawn(rows: Sequence[Row], names: dict[str, str], metric: str, workdir: pathlib.Path) -> str:
    """`draw` for the end of a command: the path, or why there is no picture."""
    try:
        return str(draw(rows, names, metric, workdir))
    except Exception as e:
        return f"not drawn: {explain(e) or f'{type(e).__name__}: {e}'}"
