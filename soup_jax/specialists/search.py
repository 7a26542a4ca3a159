"""Coefficients from documents by gradient descent, where the router's are only the start.

The router turns the histogram of the documents into coefficients alpha. Here Adam moves alpha
itself, E numbers, down the loss on the documents. How far is decided by documents that were held
back: they are cut into folds, each fold has an alpha that is fitted on the others, and all of them
stop at the step at which the held-back documents are predicted best, which may be step 0: the
histogram. The answer is the mean of the folds' alphas.

Each step reads the bank twice, in blocks (`stored`): to merge, and to project the gradients of the
merged parameters on the experts. All folds of all specialists share these reads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import tree
from soup_jax.data.tokenizer import Tokenizer
from soup_jax.evaluation.sets import TokenSet, pack
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.specialists import stored
from soup_jax.specialists.stored import Arrays

FOLDS = 3
STEPS = 40
LEARNING_RATE = 0.03
# Tokens of a step's gradient, and of the held-back documents of a fold: of more, a sample.
STEP_TOKENS = 4096
HELD_TOKENS = 8192
_EVERY = 2  # steps between two looks at the held-back documents
# Merged parameters and their gradients that are held together, of all folds.
_GROUP_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome for one specialist.

    Attributes:
      alpha_E: float32.
      steps: after how many of gradient descent; 0 is the start.
      start_loss, loss: nats per token of the documents that were held back, at the start and after
        these steps; the second is a little too good, for the steps were chosen by it. NaN if no
        document could be held back.
    """

    alpha_E: np.ndarray
    steps: int
    start_loss: float
    loss: float


@dataclasses.dataclass(frozen=True)
class _Fold:
    fitted: TokenSet
    held: TokenSet


def search(
    arrays: Arrays,
    model: BaseModel,
    tokenizer: Tokenizer,
    texts: Sequence[Sequence[str]],
    alpha_ME: np.ndarray,
    *,
    eos_id: int,
    seq_len: int,
    seed: int = 0,
) -> list[Found]:
    """The coefficients of M specialists.

    Args:
      texts: the documents of each.
      alpha_ME: where each begins, the router's.
      seed: of the folds and the samples of documents.

    Raises:
      DamagedError: an array of the bank is not what was saved.
    """
    size = 2 * tree.num_bytes([s for n, s in arrays.shapes.items() if n.startswith("shared/")])
    group = max(_GROUP_BYTES // max(FOLDS * size, 1), 1)
    arrays = stored.held(arrays)
    found: list[Found] = []
    for start in range(0, len(texts), group):
        chosen = slice(start, start + group)
        folds = [
            _folds(tokenizer, t, eos_id=eos_id, seq_len=seq_len, seed=seed) for t in texts[chosen]
        ]
        found += _search(arrays, model, folds, alpha_ME[chosen], seed)
    return found


def _folds(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_id: int, seq_len: int, seed: int
) -> list[_Fold]:
    # Each document is in one fold; folds are as equal in number as can be.
    num = min(FOLDS, len(texts))
    if num < 2:
        return []
    order = np.random.default_rng([seed, len(texts)]).permutation(len(texts))
    settings = {"eos_id": eos_id, "seq_len": seq_len}
    folds = []
    for fold in range(num):
        held = set(order[fold::num].tolist())
        parts = [[t for i, t in enumerate(texts) if (i in held) == wanted] for wanted in (0, 1)]
        most = (0, max(HELD_TOKENS // seq_len, 1))
        fitted, held_back = (
            pack(tokenizer, part, max_windows=m, **settings) for part, m in zip(parts, most)
        )
        folds.append(_Fold(fitted, held_back))
    return folds


def _search(
    arrays: Arrays,
    model: BaseModel,
    folds: Sequence[Sequence[_Fold]],
    alpha_ME: np.ndarray,
    seed: int,
) -> list[Found]:
    owner = [m for m, of_one in enumerate(folds) for _ in of_one]
    every = [fold for of_one in folds for fold in of_one]
    if not every or not alpha_ME.shape[1]:
        return [Found(alpha_E, 0, math.nan, math.nan) for alpha_E in alpha_ME]
    alpha_FE = np.asarray(alpha_ME, np.float64)[owner]
    # A generator for each fold: what is found does not depend on what is searched beside it.
    rngs = [
        np.random.default_rng([seed, f, len(fold.fitted.tokens)])
        for of_one in folds
        for f, fold in enumerate(of_one)
    ]
    moments = np.zeros((2, *alpha_FE.shape))
    curve: list[tuple[int, np.ndarray, np.ndarray]] = []  # step, alphas, held-back losses
    for step in range(STEPS + 1):
        merged = stored.merge(arrays, alpha_FE.astype(np.float32))
        if step % _EVERY == 0:
            losses = [mean_loss(model, theta, fold.held) for theta, fold in zip(merged, every)]
            curve.append((step, alpha_FE.copy(), np.array(losses)))
        if step == STEPS:
            break
        gradients = [
            _gradient(model, theta, _sample(fold.fitted, rng))
            for theta, fold, rng in zip(merged, every, rngs)
        ]
        del merged
        slope_FE = stored.project(arrays, gradients)
        moments[0] = 0.9 * moments[0] + 0.1 * slope_FE
        moments[1] = 0.95 * moments[1] + 0.05 * slope_FE**2
        first = moments[0] / (1 - 0.9 ** (step + 1))
        second = moments[1] / (1 - 0.95 ** (step + 1))
        alpha_FE -= LEARNING_RATE * first / (np.sqrt(second) + 1e-8)
    return [_chosen(curve, np.array(owner) == m, alpha_ME[m], every) for m in range(len(folds))]


def _chosen(
    curve: Sequence[tuple[int, np.ndarray, np.ndarray]],
    mine_F: np.ndarray,
    start_E: np.ndarray,
    folds: Sequence[_Fold],
) -> Found:
    if not mine_F.any():
        return Found(start_E, 0, math.nan, math.nan)
    weights = np.array([f.held.num_targets.sum() for f in folds], np.float64) * mine_F
    losses = np.array([(losses * weights).sum() / weights.sum() for _, _, losses in curve])
    best = int(np.nanargmin(losses)) if np.isfinite(losses).any() else 0
    step, alpha_FE, _ = curve[best]
    alpha_E = alpha_FE[mine_F].mean(axis=0).astype(np.float32) if step else start_E
    return Found(alpha_E, step, float(losses[0]), float(losses[best]))


def _sample(fitted: TokenSet, rng: np.random.Generator) -> TokenSet:
    most = max(STEP_TOKENS // (fitted.tokens.shape[1] - 1), 1)
    if len(fitted.tokens) <= most:
        return fitted
    rows = rng.choice(len(fitted.tokens), most, replace=False)
    return TokenSet(fitted.tokens[rows], fitted.num_targets[rows], 0)


@functools.partial(jax.jit, static_argnums=0)
def _sums(losses: Any, params: Params, rows: Any) -> tuple[Array, Array]:
    found, weights = losses(params, rows)
    return (found * weights).sum(), weights.sum()


@functools.partial(jax.jit, static_argnums=0)
def _gradient_sums(losses: Any, params: Params, rows: Any) -> tuple[Params, Array]:
    def total(params: Params) -> tuple[Array, Array]:
        found, weights = losses(params, rows)
        return (found * weights).sum(), weights.sum()

    return jax.grad(total, has_aux=True)(params)


_ROWS = 16  # windows of one call of a compiled function


def batches(scored: TokenSet) -> list[dict[str, np.ndarray]]:
    """Rows of equal shape that a network's losses take; the last is padded without targets."""
    found = []
    for start in range(0, len(scored.tokens), _ROWS):
        tokens = scored.tokens[start : start + _ROWS]
        missing = _ROWS - len(tokens)
        real = np.pad(scored.num_targets[start : start + _ROWS], (0, missing))
        found.append({"tokens": np.pad(tokens, ((0, missing), (0, 0))), "num_targets": real})
    return found


def mean_loss(model: BaseModel, params: Params, scored: TokenSet) -> float:
    """Nats per token."""
    sums = [_sums(model.example_losses, params, rows) for rows in batches(scored)]
    return sum(float(s) for s, _ in sums) / max(sum(float(w) for _, w in sums), 1.0)


def _gradient(model: BaseModel, params: Params, fitted: TokenSet) -> Params:
    total, weight = None, 0.0
    for rows in batches(fitted):
        gradient, weights = _gradient_sums(model.example_losses, params, rows)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        weight += float(weights)
    return jax.tree.map(lambda g: np.asarray(g) / max(weight, 1.0), total)
