"""The meta-distribution pi over domain weights h.

`h` lies on the simplex of dimension K and weighs *windows*: a row of the batch of mixture m comes
from domain k with probability `h_MK[m, k]`. pi is a mixture of components: the four whose
probabilities are fields of the config (sparse, generic, dirichlet and file), and those that
`domain_weights.components` names. Domains without training windows are never drawn.
"""

import bisect
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from soup_jax.data.components import (
    COMPONENTS,
    Component,
    Dirichlet,
    Generic,
    Rows,
    Sparse,
    from_file,
    thresholds,
)
from soup_jax.errors import UserError
from soup_jax.storage import sha256_bytes


@dataclasses.dataclass(frozen=True)
class MetaDistribution:
    """pi, ready to sample from; build it with `from_config`.

    Attributes:
      probabilities: of the components sparse, generic, dirichlet and file; with those of `others`
        they add up to 1.
      frequencies_K: natural domain frequencies, the generic h.
      min_support_size, support_size: range of the sparse component's support.
      concentration: of the Dirichlet component.
      rows_RK: domain weights read from a file, or None.
      support_exponent: of the natural frequencies, in drawing the sparse component's domains.
      others: (probability, component) pairs.
    """

    probabilities: tuple[float, float, float, float]
    frequencies_K: np.ndarray
    min_support_size: int
    support_size: int
    concentration: float
    rows_RK: Any = None
    support_exponent: float = 0.0
    others: tuple[tuple[float, Component], ...] = ()

    def draw(self, rng: np.random.Generator, step: int, h_K: np.ndarray) -> bool:
        """Fill zeros `h_K` with weights; True if they have yet to be divided by their sum.

        Raises:
          UserError: a component of `others` gave something else than domain weights.
        """
        number = bisect.bisect_right(self._thresholds, rng.random())
        component = self._components[number]
        unfinished = bool(component.draw(rng, step, h_K))
        if number >= len(self.probabilities):
            self._check(h_K, unfinished, f"{type(component).__name__} at step {step}")
        return unfinished

    def _check(self, h_K: np.ndarray, unfinished: bool, where: str) -> None:
        total = h_K.sum()
        if not (np.isfinite(total) and total > 0 and (h_K >= 0).all()):
            raise UserError(f"{where}: domain weights must be finite, not negative, not all zero")
        if not unfinished and abs(total - 1) > 1e-6:
            raise UserError(
                f"{where}: domain weights add up to {total:g}; divide them, or return True"
            )
        empty = np.flatnonzero((h_K > 0) & (self.frequencies_K == 0))
        if empty.size:
            raise UserError(f"{where}: weighs domains without windows: {empty.tolist()}")

    @functools.cached_property
    def _thresholds(self) -> list[float]:
        return thresholds(np.array([*self.probabilities, *(p for p, _ in self.others)])).tolist()

    @functools.cached_property
    def _components(self) -> Sequence[Component]:
        sparse = Sparse(
            self.frequencies_K,
            support_size=self.support_size,
            min_support_size=self.min_support_size,
            support_exponent=self.support_exponent,
        )
        return (
            sparse,
            Generic(self.frequencies_K),
            Dirichlet(self.frequencies_K, concentration=self.concentration),
            Rows(self.frequencies_K, rows_RK=self.rows_RK),
            *(component for _, component in self.others),
        )

    def fingerprint(self) -> str:
        """Hash of everything that determines the draws; checkpoints hold it, so its parts stay."""
        rows = None if self.rows_RK is None else self.rows_RK.tolist()
        value = [self.probabilities, self.frequencies_K.tolist(), self.min_support_size]
        value += [self.support_size, self.concentration, rows, self.support_exponent]
        if self.probabilities[2] > 0:
            value.append("draws of Dirichlet without a floor")  # the first version had one
        if self.others:
            value.append([[p, component.fingerprint()] for p, component in self.others])
        return sha256_bytes(json.dumps(value).encode())


def from_config(cfg: ConfigDict, frequencies_K: np.ndarray) -> MetaDistribution:
    """pi of a config over a corpus with these natural frequencies.

    Raises:
      UserError: the file of `domain_weights.path` is missing or not rows of K weights, or it
        weighs a domain that has no windows; there is no such component, or it does not take the
        arguments given; `support_exponent` leaves no domain a chance.
    """
    weights = cfg.domain_weights
    frequencies_K = np.asarray(frequencies_K, np.float64)
    meta = MetaDistribution(
        probabilities=(weights.sparse, weights.generic, weights.dirichlet, weights.file),
        frequencies_K=frequencies_K,
        min_support_size=weights.min_support_size,
        support_size=weights.support_size,
        concentration=weights.concentration,
        rows_RK=from_file(frequencies_K, path=weights.path).rows_RK if weights.path else None,
        support_exponent=weights.support_exponent,
        others=tuple(
            (probability, _component(frequencies_K, name, dict(*arguments)))
            for name, probability, *arguments in weights.components
        ),
    )
    _ = meta._components  # made, and so checked, now and not in a thread that reads
    return meta


def _component(frequencies_K: np.ndarray, name: str, arguments: Mapping[str, Any]) -> Component:
    make = COMPONENTS.get(name)
    try:
        return make(frequencies_K, **arguments)
    except TypeError as e:
        raise UserError(f"domain_weights.components: {name} with {dict(arguments)}: {e}") from e


def sample_domain_weights(
    meta: MetaDistribution, rng: np.random.Generator, *, step: int, num_mixtures: int
) -> np.ndarray:
    """h_MK: independent draws from pi for one step, float64 [M, K]."""
    h_MK = np.zeros((num_mixtures, len(meta.frequencies_K)))
    unfinished_M = np.array([meta.draw(rng, step, h_K) for h_K in h_MK])
    h_MK /= np.where(unfinished_M, h_MK.sum(axis=1), 1)[:, None]
    return h_MK
