"""For people to look at: the evaluation of runs side by side, and the learning-curve picture."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.evaluation import evaluate
from soup_jax.specialists import instantiate as specialist
from soup_jax.training import metrics

_log = logging.getLogger(__name__)


def evaluate_runs(
    workdir: pathlib.Path,
    *,
    against: Sequence[pathlib.Path] = (),
    specialists: Sequence[str] = (),
    json_path: str = "",
    step: int | None = None,
    max_windows: int | None = None,
    part: str = "final",
) -> tuple[str, dict[str, pathlib.Path]]:
    """`soup-jax evaluate`: the table, and where the numbers and the picture are.

    Args:
      workdir: the run whose specialists are evaluated.
      against: other runs; each becomes a column named like its folder, with that run's own
        specialists (for a generic run: its one model).
      specialists: files or globs; default: those of the run's config.
      json_path: default `evaluation.json` in the run.
      step: checkpoint of `workdir`; the others' newest is taken.
      max_windows: scored per document set, 0 for all; default: as in the run's config.
      part: of each specialist's documents, one of evaluate.PARTS.

    Raises:
      UserError: no specialists given, a run or file that cannot be read, two equal column names.
    """
    trained = specialist.load_soup(workdir, step=step)
    patterns = list(specialists) or list(trained.cfg.evaluate.specialists)
    if not patterns:
        raise UserError("--specialists='DIR/*.jsonl*' is required: the run's config names none")
    names = [path.resolve().name for path in against]
    columns = ["specialist", "generic_h", "shared", *names]
    if len(set(columns)) != len(columns):
        raise UserError(f"the columns {columns} are not all different; rename a --against folder")
    paths = evaluate.document_sets(patterns)
    result = _evaluate_one(trained, paths, max_windows, None, part)
    result["part"] = part
    result["runs"] = {"specialist": _origin(trained)}
    for name, path in zip(names, against):
        other = specialist.load_soup(path)
        if other.corpus.fingerprint != trained.corpus.fingerprint:
            _log.warning(
                "%s was trained on another corpus: compare bits per byte, not nats per token", path
            )
        numbers = _evaluate_one(other, paths, max_windows, ("specialist", "generic_h"), part)
        evaluate.combine(result, numbers, name)
        result["runs"][name] = _origin(other)
    path = pathlib.Path(json_path) if json_path else workdir / "evaluation.json"
    files.write_json(path, result)
    return f"{evaluate.table(result)}\n{verdict(result)}", {
        "numbers": path,
        "learning curve": learning_curve(workdir, against=against),
    }


def verdict(result: dict[str, Any]) -> str:
    """What the table says, in one sentence per column that the specialists are compared with."""
    average = result["average"]
    ours = average["specialist"]["loss"]
    sentences = []
    for column, value in average.items():
        if column == "specialist":
            continue
        gain = value["loss"] - ours
        word = "better" if gain > 0 else "WORSE"
        rows = result["specialists"].values()
        wins = sum(row["specialist"]["loss"] < row[column]["loss"] for row in rows)
        sentences.append(
            f"specialists are {abs(gain):.4f} nats {word} than {column} on average, "
            f"and better on {wins} of {len(rows)} sets"
        )
    return "\n".join(sentences)


def _origin(trained: specialist.TrainedSoup) -> dict[str, Any]:
    cfg = trained.cfg
    return {"workdir": str(trained.workdir), "name": cfg.name, "step": trained.step}


def _evaluate_one(
    trained: specialist.TrainedSoup,
    paths: dict[str, str],
    max_windows: int | None,
    columns: Sequence[str] | None,
    part: str,
) -> dict[str, Any]:
    cfg, corpus = trained.cfg, trained.corpus
    if max_windows is not None:
        with cfg.unlocked():
            cfg.evaluate.max_windows = max_windows
    sets = []
    for name, path in paths.items():
        sets.append(evaluate.specialist_set(name, path, corpus, cfg, part=part))
        for warning in sets[-1].histogram.warnings():
            _log.warning("specialist %s: %s", name, warning)
    return evaluate.evaluate(
        evaluate.Evaluator(
            trained.config(), trained.model, trained.mesh, batch_size=cfg.evaluate.batch_size
        ),
        trained.params,
        corpus,
        specialists=sets,
        validation=evaluate.validation_set(corpus, max_windows=cfg.evaluate.max_windows),
        columns=columns or ("specialist", "generic_h", "shared"),
    )


def learning_curve(workdir: pathlib.Path, *, against: Sequence[pathlib.Path] = ()) -> pathlib.Path:
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
    out = workdir / "learning_curve.png"
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    return out


def _different_lines(points: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    # Label -> losses. Without experts all columns are one model: one line, with no label.
    columns = points[0]["average"] if points else {}
    lines = {c: [p["average"][c]["loss"] for p in points] for c in columns}
    same = len({tuple(losses) for losses in lines.values()}) == 1
    return {"": next(iter(lines.values()))} if same else lines
