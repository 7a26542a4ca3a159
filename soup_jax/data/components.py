"""Components of the meta-distribution: each draws domain weights h in a way of its own.

- Sparse: `support_size` domains drawn without replacement, weights uniform on (0, 1) and
  normalised. The chance of a domain is proportional to frequency ** support_exponent: 0 is the
  paper's uniform draw; 1 makes the tokens of a run follow the corpus on average, which matters when
  clusters differ much in size. A `min_support_size` below `support_size` makes the number of
  domains random too, log-uniform between the two, so that training meets narrow and wide h.
- Generic: the natural frequencies, always the same h.
- Dirichlet: Dirichlet(concentration * natural frequencies), dense perturbations of the generic h.
- Rows: one of the given rows, uniformly. A single row is a fixed h: the CRISP baseline.

`COMPONENTS` gives functions (frequencies_K, **arguments) -> Component by name or dotted path.
"""

import bisect
import json
import math
import pathlib
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from soup_jax.errors import UserError
from soup_jax.inputs import read_json
from soup_jax.registry import Registry
from soup_jax.storage import sha256_bytes


class Component(Protocol):
    """One way to draw domain weights."""

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> bool | None:
        """Fill `h_K`, float64 zeros, with weights of domains that have windows.

        It must be a function of `rng` and `step` alone, as the steps of a run are drawn in any
        order, by several threads, and again after a restart.

        Returns:
          True if the weights have yet to be divided by their sum.
        """
        ...

    def fingerprint(self) -> str:
        """A hash of everything that determines the draws, beside the natural frequencies."""
        ...


# What is plain Python here where NumPy would do is a few numbers among thousands of domains: each
# call on a long array lets go of the interpreter, for which the threads that read are waiting. What
# takes long is kept instead of computed for every draw.


class Sparse:
    """A few domains with uniform weights."""

    def __init__(
        self,
        frequencies_K: np.ndarray,
        *,
        support_size: int,
        min_support_size: int = 1,
        support_exponent: float = 0.0,
    ):
        """`min_support_size` to `support_size` domains, drawn by frequency ** exponent.

        Raises:
          UserError: the exponent leaves no domain a chance that float64 holds.
        """
        self._settings = [min_support_size, support_size, support_exponent]
        self._low, self._high = min_support_size, support_size
        self._available = np.flatnonzero(frequencies_K)
        chances = frequencies_K[self._available] ** support_exponent
        if not chances.any():
            raise UserError(
                f"domain_weights.support_exponent = {support_exponent:g} is too large: frequency "
                "** support_exponent is zero for every domain. 1 draws domains by frequency, 0 "
                "uniformly"
            )
        self._chances = chances / chances.sum()
        self._chance_thresholds = thresholds(self._chances).tolist()
        self._num_chances = int(np.count_nonzero(self._chances))

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> bool:
        """Weights that have yet to be divided by their sum."""
        size = self._low
        if self._high > self._low:
            size = int(math.exp(rng.uniform(math.log(self._low), math.log(self._high + 1))))
        size = min(size, self._high, self._num_chances)
        support = self._available[self._draw_different(rng, size)]
        h_K[support] = [1 - rng.random() for _ in range(size)]  # (0, 1]: none gets weight zero
        return True

    def _draw_different(self, rng: np.random.Generator, size: int) -> list[int]:
        # The draws of `Generator.choice(replace=False, p=chances)`, which checks and sums all
        # chances anew each time. Written out, they cannot change with the version of NumPy either.
        found: list[int] = []
        limits: Any = self._chance_thresholds
        while len(found) < size:
            draws = [rng.random() for _ in range(size - len(found))]
            if found:  # some were drawn twice: draw the rest from what is left
                chances = self._chances.copy()
                chances[found] = 0
                limits = thresholds(chances).data
            # Each once, in the order of their first draw.
            found += dict.fromkeys(bisect.bisect_right(limits, u) for u in draws)
        return found

    def fingerprint(self) -> str:
        """Hash of sizes and exponent."""
        return _hash("sparse", self._settings)


class Generic:
    """The natural frequencies."""

    def __init__(self, frequencies_K: np.ndarray):
        self._frequencies_K = frequencies_K

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> None:
        """The same for every step."""
        h_K[:] = self._frequencies_K

    def fingerprint(self) -> str:
        """Hash of the name."""
        return _hash("generic", [])


class Dirichlet:
    """Perturbations of the natural frequencies, the stronger the lower the concentration."""

    def __init__(self, frequencies_K: np.ndarray, *, concentration: float):
        self._concentration = concentration
        self._available = np.flatnonzero(frequencies_K)
        self._shapes = concentration * frequencies_K[self._available]

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> None:
        """Normalised gammas."""
        # Gammas of a shape far below 1 underflow to zero, all at worst. Their logarithms do not:
        # Gamma(a) is Gamma(a + 1) * U ** (1 / a), and -log U is exponential.
        log_gamma = np.log(rng.standard_gamma(self._shapes + 1))
        log_gamma -= rng.standard_exponential(len(self._shapes)) / self._shapes
        weights = np.exp(log_gamma - log_gamma.max())
        h_K[self._available] = weights / weights.sum()

    def fingerprint(self) -> str:
        """Hash of the concentration."""
        return _hash("dirichlet", [self._concentration])


class Rows:
    """One of the given rows."""

    def __init__(self, frequencies_K: np.ndarray, *, rows_RK: np.ndarray):
        self.rows_RK = rows_RK

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> None:
        """A row, each with the same probability."""
        h_K[:] = self.rows_RK[rng.integers(len(self.rows_RK))]

    def fingerprint(self) -> str:
        """Hash of the rows."""
        return _hash("file", self.rows_RK.tolist())


def from_file(frequencies_K: np.ndarray, *, path: str) -> Rows:
    """The rows of a file, as `read_rows` reads them.

    Raises:
      UserError: the file is missing or not rows of K weights, or weighs a domain without windows.
    """
    rows_RK = read_rows(pathlib.Path(path), len(frequencies_K))
    empty = np.flatnonzero((rows_RK > 0).any(0) & (frequencies_K == 0))
    if empty.size:
        raise UserError(f"{path} weighs domains without windows: {empty.tolist()}")
    return Rows(frequencies_K, rows_RK=rows_RK)


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


COMPONENTS: Registry[Callable[..., Component]] = Registry(
    "component of the meta-distribution",
    {"sparse": Sparse, "generic": Generic, "dirichlet": Dirichlet, "file": from_file},
)


def thresholds(chances: np.ndarray) -> np.ndarray:
    """Where `bisect_right` must look for a uniform draw; the last is exactly 1, above any draw."""
    cumulative = np.cumsum(chances, dtype=np.float64)
    return cumulative / cumulative[-1]


def _hash(name: str, settings: list) -> str:
    return sha256_bytes(json.dumps([name, settings]).encode())
