"""The picture of a run: its training loss and its evaluations, beside those of other runs."""

import pathlib
from collections.abc import Sequence
from typing import Any

from soup_jax import places
from soup_jax import storage as files
from soup_jax.errors import explain
from soup_jax.training import metrics


def draw(workdir: pathlib.Path, *, against: Sequence[pathlib.Path] = ()) -> pathlib.Path:
    """Draw training loss and evaluation losses of one or more runs; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for place in (workdir, *against):
        path = places.local(place)
        lines = metrics.read_metrics(path / "metrics.jsonl")
        lines = [v for v in lines if "tokens" in v and "loss" in v]
        name = pathlib.Path(place).resolve().name
        left.plot([v["tokens"] / 1e6 for v in lines], [v["loss"] for v in lines], label=name)
        tokens = {v["step"]: v["tokens"] / 1e6 for v in lines}
        points = metrics.read_metrics(path / "metrics.jsonl", kind="evaluation")
        points = [p for p in points if p["step"] in tokens]
        for label, losses in _different_lines(points).items():
            x = [tokens[p["step"]] for p in points]
            right.plot(x, losses, marker="o", label=f"{name}: {label}" if label else name)
    left.set(xlabel="million tokens", ylabel="nats per token", title="training (batches of mix(h))")
    right.set(xlabel="million tokens", title="specialist sets, average")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    if not right.lines:
        right.text(0.5, 0.5, "evaluate.every_steps is 0", ha="center", transform=right.transAxes)
    out = places.local(workdir) / "learning_curve.png"
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return out


def drawn(workdir: pathlib.Path, *, against: Sequence[pathlib.Path] = ()) -> str:
    """`draw` for the end of a command: the path, or why there is no picture.

    What the command was for is done by then, so nothing that goes wrong here may make it fail.
    """
    try:
        return places.given_back(draw(workdir, against=against), workdir)
    except Exception as e:
        return f"not drawn: {explain(e) or f'{type(e).__name__}: {e}'}"


def _different_lines(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    # Label -> losses. Without experts all columns are one model: one line, with no label.
    columns = points[0]["average"] if points else {}
    lines = {c: [p["average"][c]["loss"] for p in points] for c in columns}
    same = len({tuple(losses) for losses in lines.values()}) == 1
    return {"": next(iter(lines.values()))} if same else lines
