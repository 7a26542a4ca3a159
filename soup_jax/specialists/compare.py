"""Evaluation of trained runs side by side."""

import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from soup_jax.data.corpus import Corpus
from soup_jax.errors import UserError
from soup_jax.evaluation import sets as sets_lib
from soup_jax.evaluation import table
from soup_jax.evaluation.evaluator import COLUMNS, Evaluator, evaluate
from soup_jax.specialists.open import corpus_of, load
from soup_jax.specialists.trained import Soup

_log = logging.getLogger(__name__)


def evaluate_runs(
    workdir: str | pathlib.Path,
    *,
    against: Sequence[str | pathlib.Path] = (),
    specialists: Sequence[str] = (),
    step: int | None = None,
    max_windows: int | None = None,
    part: str = "final",
) -> dict[str, Any]:
    """Losses of a run's specialists, and of other runs on the same documents.

    Args:
      workdir: the run whose specialists are evaluated.
      against: other runs; each becomes a column named like its folder, with that run's own
        specialists (for a generic run: its one model).
      specialists: files or globs; default: those of the run's config.
      step: checkpoint of `workdir`; the others' newest is taken.
      max_windows: scored per document set, 0 for all; default: as in the run's config.
      part: of each specialist's documents, one of `sets.PARTS`.

    Returns:
      As `evaluator.evaluate` says, with a column for each of `against`, "part" and "runs"; a
      specialist has "alpha", E coefficients, and "h", its weight of each domain that has one.

    Raises:
      UserError: no specialists given, a run or file that cannot be read, two equal column names.
    """
    trained = load(workdir, step=step).resident()
    patterns = list(specialists) or list(trained.cfg.evaluate.specialists)
    if not patterns:
        raise UserError("--specialists='DIR/*.jsonl*' is required: the run's config names none")
    names = [pathlib.Path(path).resolve().name for path in against]
    columns = [*COLUMNS, *names]
    if len(set(columns)) != len(columns):
        raise UserError(f"the columns {columns} are not all different; rename a --against folder")
    paths = sets_lib.document_sets(patterns)
    # All columns score the same documents, and none of them what its network was trained on.
    corpora = {c.fingerprint: c for c in [trained.corpus, *map(corpus_of, against)]}
    for corpus in corpora.values():
        if corpus.trained_on([]) is None:
            _log.warning(
                "%s was prepared by an earlier version, which kept no hashes of its documents: "
                "documents that are in its training text are scored like others",
                corpus.path,
            )
    settings = (paths, max_windows, part, list(corpora.values()))
    result = _evaluate_one(trained, COLUMNS, *settings)
    result["part"] = part
    result["runs"] = {"specialist": _origin(trained)}
    fingerprint = trained.corpus.fingerprint
    for name, path in zip(names, against):
        del trained  # one run at a time is on the devices
        trained = load(path).resident()
        if trained.corpus.fingerprint != fingerprint:
            _log.warning(
                "%s was trained on another corpus: compare bits per byte, not nats per token", path
            )
        table.combine(result, _evaluate_one(trained, COLUMNS[:2], *settings), name)
        result["runs"][name] = _origin(trained)
    return result


def _origin(trained: Soup) -> dict[str, Any]:
    cfg = trained.cfg
    return {"workdir": trained.place, "name": cfg.name, "step": trained.step}


def _evaluate_one(
    trained: Soup,
    columns: Sequence[str],
    paths: dict[str, str],
    max_windows: int | None,
    part: str,
    others: Sequence[Corpus],
) -> dict[str, Any]:
    cfg, corpus = trained.cfg, trained.corpus
    if max_windows is not None:
        with cfg.unlocked():
            cfg.evaluate.max_windows = max_windows
    sets = []
    for name, path in paths.items():
        sets.append(sets_lib.specialist_set(name, path, corpus, cfg, part=part, others=others))
        for warning in sets[-1].histogram.warnings():
            _log.warning("specialist %s: %s", name, warning)
    validation = sets_lib.validation_set(corpus, max_windows=cfg.evaluate.max_windows)
    evaluator = Evaluator(
        trained.config,
        trained.model,
        trained.mesh,
        batch_size=cfg.evaluate.batch_size,
        sets=[*(s.scored for s in sets), validation],
    )
    result = evaluate(
        evaluator,
        trained.params,
        corpus.domain_frequencies,
        specialists=sets,
        validation=validation,
        columns=columns,
    )
    alpha_ME = trained.coefficients(np.stack([s.histogram.h_K for s in sets]))
    for s, alpha_E in zip(sets, alpha_ME):
        row, h_K = result["specialists"][s.name], s.histogram.h_K
        row["alpha"] = [float(a) for a in alpha_E]
        row["h"] = {str(k): float(h_K[k]) for k in np.flatnonzero(h_K)}
    return result
