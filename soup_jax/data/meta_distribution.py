"""The meta-distribution pi over domain weights h.

`h` lies on the simplex of dimension K and weighs *windows*: a row of the batch of mixture m comes
from domain k with probability `h_MK[m, k]`. pi is a mixture of four components:

- sparse: `support_size` domains drawn without replacement, weights uniform on (0, 1) and
  normalised. Domains are drawn with probability proportional to frequency ** support_exponent: 0 is
  the paper's uniform draw; 1 makes the tokens of a run follow the corpus on average, which matters
  when clusters differ much in size. With `min_support_size` below it the size is itself drawn,
  log-uniformly, so that specialists whose histogram is narrow or wide are both met in training.
- generic: the natural frequencies, always the same h.
- dirichlet: Dirichlet(concentration * natural frequencies), dense perturbations of the generic h.
- file: one of the given rows, uniformly. A single row is a fixed h: the CRISP baseline.

Domains without training windows are never drawn.
"""

import bisect
import dataclasses
import functools
import json
import math
import pathlib

import numpy as np
from ml_collections import ConfigDict

from soup_jax.errors import UserError
from soup_jax.storage import read_json, sha256_bytes


@dataclasses.dataclass(frozen=True)
class MetaDistribution:
    """pi, ready to sample from; build it with `from_config`.

    Attributes:
      probabilities: of the components (sparse, generic, dirichlet, file); they add up to 1.
      frequencies_K: natural domain frequencies, the generic h.
      min_support_size, support_size: range of the sparse component's support.
      concentration: of the Dirichlet component.
      support_exponent: of the natural frequencies, in drawing the sparse component's domains.
      rows_RK: domain weights read from a file, or None.
    """

    probabilities: tuple[float, float, float, float]
    frequencies_K: np.ndarray
    min_support_size: int
    support_size: int
    concentration: float
    rows_RK: np.ndarray | None = None
    support_exponent: float = 0.0

    def draw(self, rng: np.random.Generator, h_K: np.ndarray) -> bool:
        """Fill zeros `h_K` with weights; True if they have yet to be divided by their sum."""
        component = bisect.bisect_right(self._thresholds, rng.random())
        if component == 0:
            self._sparse(rng, h_K)
        elif component == 1:
            h_K[:] = self.frequencies_K
        elif component == 2:
            # Gammas of a shape far below 1 underflow to zero, all at worst: floor the shapes.
            shapes = np.maximum(self.concentration * self.frequencies_K[self._available], 1e-2)
            h_K[self._available] = rng.dirichlet(shapes)
        else:
            h_K[:] = self.rows_RK[rng.integers(len(self.rows_RK))]
        return component == 0

    # The rest is plain Python where NumPy would do: these are a few numbers among thousands of
    # domains, and each call on a long array lets go of the interpreter, for which the threads that
    # read are waiting. What takes long is kept instead of computed for every draw.

    def _sparse(self, rng: np.random.Generator, h_K: np.ndarray) -> None:
        low, high = self.min_support_size, self.support_size
        size = low
        if high > low:
            size = int(math.exp(rng.uniform(math.log(low), math.log(high + 1))))
        size = min(size, high, self._num_chances)
        support = self._available[self._draw_different(rng, size)]
        h_K[support] = [1 - rng.random() for _ in range(size)]  # (0, 1]: none gets weight zero

    def _draw_different(self, rng: np.random.Generator, size: int) -> list[int]:
        # The draws of `Generator.choice(replace=False, p=chances)`, which checks and sums all
        # chances anew each time. Written out, they cannot change with the version of NumPy either.
        found: list[int] = []
        thresholds = self._chance_thresholds
        while len(found) < size:
            draws = [rng.random() for _ in range(size - len(found))]
            if found:  # some were drawn twice: draw the rest from what is left
                chances = self._chances.copy()
                chances[found] = 0
                thresholds = memoryview(_thresholds(chances))
            # Each once, in the order of their first draw.
            found += dict.fromkeys(bisect.bisect_right(thresholds, u) for u in draws)
        return found

    @functools.cached_property
    def _thresholds(self) -> list[float]:
        return _thresholds(np.asarray(self.probabilities)).tolist()

    @functools.cached_property
    def _available(self) -> np.ndarray:
        return np.flatnonzero(self.frequencies_K)

    @functools.cached_property
    def _chances(self) -> np.ndarray:
        chances = self.frequencies_K[self._available] ** self.support_exponent
        return chances / chances.sum()

    @functools.cached_property
    def _chance_thresholds(self) -> list[float]:
        return _thresholds(self._chances).tolist()

    @functools.cached_property
    def _num_chances(self) -> int:
        return np.count_nonzero(self._chances)

    def fingerprint(self) -> str:
        """Hash of everything that determines the draws."""
        rows = None if self.rows_RK is None else self.rows_RK.tolist()
        value = [self.probabilities, self.frequencies_K.tolist(), self.min_support_size]
        value += [self.support_size, self.concentration, rows, self.support_exponent]
        return sha256_bytes(json.dumps(value).encode())


def from_config(cfg: ConfigDict, frequencies_K: np.ndarray) -> MetaDistribution:
    """pi of a config over a corpus with these natural frequencies.

    Raises:
      UserError: the file of `domain_weights.path` is missing or not rows of K weights, or it
        weighs a domain that has no windows.
    """
    weights = cfg.domain_weights
    rows = None
    if weights.path:
        rows = read_rows(pathlib.Path(weights.path), len(frequencies_K))
        empty = np.flatnonzero((rows > 0).any(0) & (frequencies_K == 0))
        if empty.size:
            raise UserError(f"{weights.path} weighs domains without windows: {empty.tolist()}")
    return MetaDistribution(
        probabilities=(weights.sparse, weights.generic, weights.dirichlet, weights.file),
        frequencies_K=np.asarray(frequencies_K, np.float64),
        min_support_size=weights.min_support_size,
        support_size=weights.support_size,
        concentration=weights.concentration,
        rows_RK=rows,
        support_exponent=weights.support_exponent,
    )


def read_rows(path: pathlib.Path, num_domains: int) -> np.ndarray:
    """Rows [R, K] of domain weights from a JSON file: one list, a list of lists, or a recipe.

    Raises:
      UserError: not K non-negative finite numbers that add up to 1 (to 1e-3) per row.
    """
    value = read_json(path)
    value = value.get("h") if isinstance(value, dict) else value
    try:
        rows = np.atleast_2d(np.asarray(value, np.float64))
    except (TypeError, ValueError) as e:
        raise UserError(
            f"{path} must hold a list of {num_domains} numbers, or lists of them"
        ) from e
    if rows.ndim != 2 or rows.shape[1] != num_domains:
        raise UserError(f"{path} has shape {rows.shape}, expected rows of {num_domains} weights")
    if not np.isfinite(rows).all() or (rows < 0).any() or (abs(rows.sum(1) - 1) > 1e-3).any():
        raise UserError(f"{path}: every row must be non-negative and add up to 1")
    return rows / rows.sum(1, keepdims=True)


def sample_domain_weights(
    meta: MetaDistribution, rng: np.random.Generator, *, num_mixtures: int
) -> np.ndarray:
    """h_MK: independent draws from pi, float64 [M, K]."""
    h_MK = np.zeros((num_mixtures, len(meta.frequencies_K)))
    unfinished_M = np.array([meta.draw(rng, h_K) for h_K in h_MK])
    h_MK /= np.where(unfinished_M, h_MK.sum(axis=1), 1)[:, None]
    return h_MK


def _thresholds(chances: np.ndarray) -> np.ndarray:
    # Dividing by the last value makes it exactly 1, above any draw from [0, 1).
    cumulative = np.cumsum(chances, dtype=np.float64)
    return cumulative / cumulative[-1]
