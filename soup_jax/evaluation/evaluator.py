"""Losses of specialists, of the shared parameters and at generic domain weights, on token sets.

Columns: `specialist` (merged at its own h), `generic_h` (merged at the natural frequencies),
`shared` (S alone). Losses are nats per token. Bits per byte divide by the bytes of the scored
tokens: compare these between runs with different tokenizers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from soup_jax import soup
from soup_jax.errors import UserError
from soup_jax.evaluation.sets import SpecialistSet, TokenSet
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.soup import SoupConfig, merge
from soup_jax.soup import layout as sharding

COLUMNS = ("specialist", "generic_h", "shared")


class Evaluator:
    """Scores token sets under merged models of one soup; compiles each function once.

    With many processes, all call the same methods with the same sets and get the same numbers.
    """

    def __init__(
        self,
        config: SoupConfig,
        model: BaseModel,
        mesh: Mesh,
        *,
        batch_size: int,
        sets: Iterable[TokenSet | None] = (),
    ):
        """Settings, model and mesh are those of the run that is evaluated.

        Args:
          batch_size: windows per forward pass, rounded up to the devices.
          sets: what will be scored, if it is known: a batch need not be larger than the largest.
        """
        self._mesh = mesh
        most = max((len(s.tokens) for s in sets if s is not None), default=batch_size)
        self._rows = -(-min(batch_size, max(most, 1)) // mesh.size) * mesh.size
        everywhere = sharding.replicated(mesh)

        def merged(params: Params, h_K: jax.Array) -> Params:
            return _cast(soup.specialist(params, h_K, config)[0], config.compute_dtype)

        def shared(params: Params) -> Params:
            return _cast(merge.merge(params["shared"], {}, jnp.zeros((0,))), config.compute_dtype)

        def score(theta: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
            losses, weights = model.example_losses(theta, batch)
            axes = tuple(range(1, losses.ndim))
            return (losses * weights).sum(axes), weights.sum(axes)

        self._merged = jax.jit(merged, out_shardings=everywhere)
        self._shared = jax.jit(shared, out_shardings=everywhere)
        self._score = jax.jit(score, out_shardings=everywhere)

    def at(self, params: Params, h_K: np.ndarray) -> Params:
        """Theta(h) on every device."""
        return self._merged(params, np.asarray(h_K, np.float32))

    def shared(self, params: Params) -> Params:
        """S on every device."""
        return self._shared(params)

    def _spread(self, value: np.ndarray) -> jax.Array:
        # Every process has all rows, and gives its devices theirs.
        where = sharding.batch(self._mesh)
        return jax.make_array_from_callback(value.shape, where, lambda index: value[index])

    def loss(
        self, theta: Params, scored: TokenSet, *, between: Callable[[], None] = lambda: None
    ) -> dict[str, float]:
        """{"loss": nats per token, "bits_per_byte"}; `between` is called after each batch."""
        total, weight = 0.0, 0.0
        for start in range(0, len(scored.tokens), self._rows):
            chunk = slice(start, start + self._rows)
            tokens, real = scored.tokens[chunk], scored.num_targets[chunk]
            missing = self._rows - len(tokens)
            batch = {
                "tokens": self._spread(np.pad(tokens, ((0, missing), (0, 0)))),
                "num_targets": self._spread(np.pad(real, (0, missing))),
            }
            loss, weights = self._score(theta, batch)
            total += float(np.asarray(loss, np.float64).sum())
            weight += float(np.asarray(weights, np.float64).sum())
            between()
        if weight == 0:
            raise UserError("no tokens to score")
        return {
            "loss": total / weight,
            "bits_per_byte": total / math.log(2) / max(scored.num_bytes, 1),
        }


def _cast(params: Params, dtype: str) -> Params:
    return jax.tree.map(lambda x: x.astype(dtype), params)


def evaluate(
    evaluator: Evaluator,
    params: Params,
    frequencies_K: np.ndarray,
    *,
    specialists: Iterable[SpecialistSet],
    validation: TokenSet | None,
    columns: Sequence[str] = COLUMNS,
    between: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """The result dict of one run (see `table.combine` for several).

    Returns:
      {"specialists": {NAME: {"tokens", "bytes", "documents_in_training",
                              COLUMN: {"loss", "bits_per_byte"}}},
       "average": {COLUMN: {...}}, "generic_validation": {COLUMN: {...}}}; the average is over
      specialists, each with the same weight. `documents_in_training` counts those left out of the
      score (`sets.SpecialistSet`).
    """
    fixed = {}
    if "generic_h" in columns:
        fixed["generic_h"] = evaluator.at(params, frequencies_K)
    if "shared" in columns:
        fixed["shared"] = evaluator.shared(params)
    rows: dict[str, Any] = {}
    for s in specialists:
        row: dict[str, Any] = {
            "tokens": int(s.scored.num_targets.sum()),
            "bytes": s.scored.num_bytes,
            "documents_in_training": s.num_in_training,
        }
        if "specialist" in columns:
            theta = evaluator.at(params, s.histogram.h_K)
            row["specialist"] = evaluator.loss(theta, s.scored, between=between)
            del theta
        for name, theta in fixed.items():
            row[name] = evaluator.loss(theta, s.scored, between=between)
        rows[s.name] = row
    result: dict[str, Any] = {"specialists": rows, "average": {}, "generic_validation": {}}
    if rows:
        result["average"] = {c: _average(rows, c) for c in columns}
    if validation is not None:
        result["generic_validation"] = {
            name: evaluator.loss(theta, validation, between=between)
            for name, theta in fixed.items()
        }
    return result


def _average(rows: dict[str, Any], column: str) -> dict[str, float]:
    return {
        key: float(np.mean([row[column][key] for row in rows.values()]))
        for key in ("loss", "bits_per_byte")
    }
