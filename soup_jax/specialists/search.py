"""Coefficients from documents by gradient descent, where the router's are only the start.

The router turns the histogram of the documents into coefficients alpha. Here Adam moves alpha
itself, E numbers, down the loss on the documents. How far is decided by documents that were held
back: they are cut into folds, each fold has an alpha that is fitted on the others, and all of them
stop at the step that is surest to predict the held-back documents better: where the gain over the
histogram, less two standard errors, is largest. If it is above 0 nowhere, the histogram stays. The
answer is the mean of the folds' alphas.

Each step reads the bank twice, in blocks (`stored`): to merge, and to project the gradients of the
merged parameters on the experts. All folds of all specialists share these reads.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from soup_jax import soup as soup_lib
from soup_jax import tree
from soup_jax.data.domain_map import DomainMap
from soup_jax.data.tokenizer import Tokenizer
from soup_jax.evaluation.sets import TokenSet, pack
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.soup import SoupConfig
from soup_jax.specialists import stored
from soup_jax.specialists.stored import Arrays

# By the name of a method: what is moved.
OVER = {"search": "alpha", "search_h": "h"}
FOLDS = 3
STEPS = 24
LEARNING_RATE = 0.05
H_LEARNING_RATE = 0.5
# Tokens of a step's gradient, and of the held-back documents of a fold: of more, a sample.
STEP_TOKENS = 4096
HELD_TOKENS = 4096
_EVERY = 3  # steps between two looks at the held-back documents
# A gain must be this many of its standard errors above 0: with none, two of 16 specialists of 20
# documents lost up to 0.006 nats on others; with two, none, and the mean gain was as large
# (benchmarks/search.py; docs/specialists.md).
_SURE = 2.0
# Merged parameters and their gradients that are held together, of all folds.
_GROUP_BYTES = 4 << 30


@dataclasses.dataclass(frozen=True)
class Found:
    """The outcome for one specialist.

    Attributes:
      alpha_E: float32.
      h_K: the domain weights that have these coefficients if `over` was "h", else those given.
      steps: after how many of gradient descent; 0 is the start.
      start_loss, loss: nats per token of the documents that were held back, at the start and after
        these steps; the second is a little too good, for the steps were chosen by it. NaN if no
        document could be held back.
    """

    alpha_E: np.ndarray
    h_K: np.ndarray
    steps: int
    start_loss: float
    loss: float


class Searchable(Protocol):
    """What is read of a soup (`trained.Soup`)."""

    @property
    def arrays(self) -> Arrays:
        """The parameters on disk."""
        ...

    @property
    def model(self) -> BaseModel:
        """The base network."""
        ...

    @property
    def map(self) -> DomainMap:
        """The domains."""
        ...

    @property
    def cfg(self) -> ConfigDict:
        """The run's config."""
        ...

    @property
    def config(self) -> SoupConfig:
        """The soup's static settings."""
        ...

    def coefficients(self, h_MK: np.ndarray) -> np.ndarray:
        """alpha_ME."""
        ...


@dataclasses.dataclass(frozen=True)
class _Fold:
    fitted: TokenSet
    held: TokenSet


class _Alpha:
    # The coefficients themselves move.

    def __init__(self, soup: Searchable, h_MK: np.ndarray):
        self.rate = LEARNING_RATE
        self.start = soup.coefficients(h_MK).astype(np.float64)

    def alpha(self, at: np.ndarray) -> np.ndarray:
        return at.astype(np.float32)

    def slope(self, at: np.ndarray, slope_FE: np.ndarray) -> np.ndarray:
        return slope_FE

    def found(self, at: np.ndarray, h_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return at.mean(axis=0).astype(np.float32), h_K


class _Weights:
    # The domain weights move, as logits; one without any weight starts with a little.

    def __init__(self, soup: Searchable, h_MK: np.ndarray):
        self.rate = H_LEARNING_RATE
        self._soup = soup
        self._router = stored.read_below(soup.arrays, "router")
        mixed = 0.99 * h_MK + 0.01 * soup.map.domain_frequencies
        self.start = np.log(np.maximum(mixed, 1e-12))

    def alpha(self, at: np.ndarray) -> np.ndarray:
        return np.asarray(_route(self._router, at.astype(np.float32), self._soup.config))

    def slope(self, at: np.ndarray, slope_FE: np.ndarray) -> np.ndarray:
        found = _route_slope(
            self._router, at.astype(np.float32), slope_FE.astype(np.float32), self._soup.config
        )
        return np.asarray(found, np.float64)

    def found(self, at: np.ndarray, h_K: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weights = np.exp(at - at.max(axis=1, keepdims=True))
        h_K = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
        return self._soup.coefficients(h_K[None])[0], h_K


@functools.partial(jax.jit, static_argnums=2)
def _route(router: Params, at: Array, config: SoupConfig) -> Array:
    return soup_lib.coefficients({"router": router}, jax.nn.softmax(at), config)


@functools.partial(jax.jit, static_argnums=3)
def _route_slope(router: Params, at: Array, slope_FE: Array, config: SoupConfig) -> Array:
    return jax.vjp(lambda x: _route(router, x, config), at)[1](slope_FE)[0]


def search(
    soup: Searchable,
    texts: Sequence[Sequence[str]],
    h_MK: np.ndarray,
    *,
    over: str = "alpha",
    seed: int = 0,
) -> list[Found]:
    """The coefficients of M specialists.

    Args:
      texts: the documents of each.
      h_MK: their histograms, where the search begins.
      over: what is moved: "alpha", or the domain weights "h" behind them.
      seed: of the folds and the samples of documents.

    Raises:
      DamagedError: an array of the bank is not what was saved.
    """
    if not texts:
        return []
    group = max(_GROUP_BYTES // max(_fold_bytes(soup.arrays), 1), 1)
    arrays = stored.held(soup.arrays)
    tokenizer, eos_id, seq_len = soup.map.tokenizer(), soup.map.eos_id, soup.cfg.seq_len
    found: list[Found] = []
    for start in range(0, len(texts), group):
        chosen = slice(start, start + group)
        folds = [
            _folds(tokenizer, t, eos_id=eos_id, seq_len=seq_len, seed=seed) for t in texts[chosen]
        ]
        space = (_Alpha if over == "alpha" else _Weights)(soup, h_MK[chosen])
        found += _search(soup, arrays, space, folds, h_MK[chosen], seed)
    return found


def search_bytes(arrays: Arrays, num_specialists: int) -> int:
    """About what the arrays of `search` take at most: the folds' parameters with their gradients,
    and the soup, where it is small enough to be read once."""
    folds = min(num_specialists * _fold_bytes(arrays), max(_GROUP_BYTES, _fold_bytes(arrays)))
    held = tree.num_bytes(arrays.shapes) if stored.are_held(arrays) else 0
    return folds + held + stored.merge_bytes(arrays, 0)


def _fold_bytes(arrays: Arrays) -> int:
    # Of one specialist's folds: parameters and gradients.
    shared = [s for n, s in arrays.shapes.items() if n.startswith("shared/")]
    return 2 * FOLDS * tree.num_bytes(shared)


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
    soup: Searchable,
    arrays: Arrays,
    space: _Alpha | _Weights,
    folds: Sequence[Sequence[_Fold]],
    h_MK: np.ndarray,
    seed: int,
) -> list[Found]:
    model, start_ME = soup.model, soup.coefficients(h_MK)
    owner = [m for m, of_one in enumerate(folds) for _ in of_one]
    every = [fold for of_one in folds for fold in of_one]
    curve: list[tuple[int, np.ndarray, list[np.ndarray]]] = []  # step, places, held-back losses
    at = space.start[owner]
    # A generator for each fold: what is found does not depend on what is searched beside it.
    rngs = [
        np.random.default_rng([seed, f, len(fold.fitted.tokens)])
        for of_one in folds
        for f, fold in enumerate(of_one)
    ]
    moments = np.zeros((2, *at.shape))
    for step in range(STEPS + 1 if every and start_ME.shape[1] else 0):
        # Step 0 is the histogram itself.
        alpha_FE = space.alpha(at) if step else start_ME[owner]
        merged = stored.merge(arrays, alpha_FE)
        if step % _EVERY == 0:
            losses = [window_nats(model, theta, fold.held) for theta, fold in zip(merged, every)]
            curve.append((step, at.copy(), losses))
        if step == STEPS:
            break
        gradients = [
            _gradient(model, theta, _sample(fold.fitted, rng))
            for theta, fold, rng in zip(merged, every, rngs)
        ]
        del merged
        slope = space.slope(at, stored.project(arrays, gradients))
        moments[0] = 0.9 * moments[0] + 0.1 * slope
        moments[1] = 0.95 * moments[1] + 0.05 * slope**2
        first = moments[0] / (1 - 0.9 ** (step + 1))
        second = moments[1] / (1 - 0.95 ** (step + 1))
        at = at - space.rate * first / (np.sqrt(second) + 1e-8)
    found = []
    for m, h_K in enumerate(h_MK):
        step, mine, (before, after) = _best(curve, np.array(owner) == m, every)
        alpha_E, best_K = space.found(mine, h_K) if step else (start_ME[m], h_K)
        found.append(Found(alpha_E, best_K, step, before, after))
    return found


def _best(
    curve: Sequence[tuple[int, np.ndarray, Sequence[np.ndarray]]],
    mine_F: np.ndarray,
    folds: Sequence[_Fold],
) -> tuple[int, np.ndarray, tuple[float, float]]:
    # The step, the places of its folds, and the held-back losses at the start and there.
    if not curve or not mine_F.any():
        return 0, np.zeros((0, 0)), (math.nan, math.nan)
    mine = np.flatnonzero(mine_F).tolist()
    targets_W = np.concatenate([folds[f].held.num_targets for f in mine]).astype(np.float64)
    nats_TW = np.stack([np.concatenate([nats[f] for f in mine]) for _, _, nats in curve])
    total, count = targets_W.sum(), len(targets_W)
    gain_TW = nats_TW[0] - nats_TW
    gain_T = gain_TW.sum(axis=1) / total
    spread_T = ((gain_TW - gain_T[:, None] * targets_W) ** 2).sum(axis=1)
    error_T = np.sqrt(spread_T * count / max(count - 1, 1)) / total
    sure_T = gain_T - _SURE * error_T
    best = int(np.nanargmax(sure_T)) if np.isfinite(sure_T).any() else 0
    step, at, _ = curve[best]
    losses_T = nats_TW.sum(axis=1) / total
    return step, at[mine_F], (float(losses_T[0]), float(losses_T[best]))


def _sample(fitted: TokenSet, rng: np.random.Generator) -> TokenSet:
    most = max(STEP_TOKENS // (fitted.tokens.shape[1] - 1), 1)
    if len(fitted.tokens) <= most:
        return fitted
    rows = rng.choice(len(fitted.tokens), most, replace=False)
    return TokenSet(fitted.tokens[rows], fitted.num_targets[rows], 0)


@functools.partial(jax.jit, static_argnums=0)
def _nats(losses: Any, params: Params, rows: Any) -> Array:
    found, weights = losses(params, rows)
    return (found * weights).reshape(len(found), -1).sum(-1)


@functools.partial(jax.jit, static_argnums=0)
def _gradient_sums(losses: Any, params: Params, rows: Any) -> tuple[Params, Array]:
    def total(params: Params) -> tuple[Array, Array]:
        found, weights = losses(params, rows)
        return (found * weights).sum(), weights.sum()

    return jax.grad(total, has_aux=True)(params)


_ROWS = 16  # most windows of one call of a compiled function


def batches(scored: TokenSet) -> list[dict[str, np.ndarray]]:
    """Rows of few shapes that a network's losses take; the last are padded without targets."""
    found = []
    rows = min(_ROWS, 1 << (len(scored.tokens) - 1).bit_length())
    for start in range(0, len(scored.tokens), rows):
        tokens = scored.tokens[start : start + rows]
        missing = rows - len(tokens)
        real = np.pad(scored.num_targets[start : start + rows], (0, missing))
        found.append({"tokens": np.pad(tokens, ((0, missing), (0, 0))), "num_targets": real})
    return found


def window_nats(model: BaseModel, params: Params, scored: TokenSet) -> np.ndarray:
    """float64 [n]: nats of the targets of each window."""
    nats = [np.asarray(_nats(model.example_losses, params, rows)) for rows in batches(scored)]
    return np.concatenate(nats)[: len(scored.tokens)].astype(np.float64)


def mean_loss(model: BaseModel, params: Params, scored: TokenSet) -> float:
    """Nats per token."""
    return float(window_nats(model, params, scored).sum() / max(scored.num_targets.sum(), 1))


def _gradient(model: BaseModel, params: Params, fitted: TokenSet) -> Params:
    total, weight = None, 0.0
    for rows in batches(fitted):
        gradient, weights = _gradient_sums(model.example_losses, params, rows)
        total = gradient if total is None else jax.tree.map(jnp.add, total, gradient)
        weight += float(weights)
    return jax.tree.map(lambda g: np.asarray(g) / max(weight, 1.0), total)
