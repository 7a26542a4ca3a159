"""The picture of a run: its training loss and its evaluations, beside those of other runs."""

import pathlib
from collections.abc import Sequence

from soup_jax import storage as files
from soup_jax.training import metrics


def draw(workdir: pathlib.Path, *, against: Sequence[pathlib.Path] = ()) -> pathlib.Path:
    """Draw training loss and evaluation losses of one or more runs; returns the PNG's path."""
    import matplotlib

    matplotlib.use("Agg", force=False)
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for path in (workdir, *against):
        lines = metrics.read_metrics(path / "metrics.jsonl")
        name = path.resolve().name
        left.plot([v["tokens"] / 1e6 for v in lines], [v["loss"] for v in lines], label=name)
        tokens = {v["step"]: v["tokens"] / 1e6 for v in lines}
        points = metrics.read_metrics(path / "metrics.jsonl", kind="evaluation")
        points = [p for p in points if p["step"] in tokens]
        for column in points[0]["average"] if points else ():
            right.plot(
                [tokens[p["step"]] for p in points],
                [p["average"][column]["loss"] for p in points],
                marker="o",
                label=f"{name}: {column}",
            )
    left.set(xlabel="million tokens", ylabel="nats per token", title="training (batches of mix(h))")
    right.set(xlabel="million tokens", title="specialist sets, average")
    for axes in (left, right):
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize=8)
    if not right.lines:
        right.text(0.5, 0.5, "evaluate.every_steps is 0", ha="center", transform=right.transAxes)
    out = workdir / "learning_curve.png"
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return out
