"""Optimizers of experts whose gradients are factored (see `soup`), by name.

docs/bank_optimizers.md compares "merged" and "adamw" by measurement, and gives the reason for the
default. One of your own is a class or function like those here, registered or named by a dotted
path, as in `--config.optimizer.bank=my_package.optim:Lion`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from soup_jax.optim.adamw import AdamW
from soup_jax.optim.config import OptimizerConfig
from soup_jax.optim.merged_space import MergedSpace
from soup_jax.registry import Registry
from soup_jax.shapes import Array, Params


class BankOptimizer(Protocol):
    """Pure functions, and what a mesh and a plan must know of them."""

    @property
    def layout(self) -> Mapping[str, str]:
        """Of each entry of the state, whether its leaves are shaped like the "experts" [E, *leaf],
        like the "merged" model [*leaf], or small and wanted "everywhere"."""

    @property
    def bank_passes(self) -> float:
        """How often an update reads or writes the bank."""

    @property
    def state_passes(self) -> float:
        """How often an update reads or writes the state."""

    def init(self, bank: Params) -> dict[str, Any]:
        """State of a bank of leaves [E, ...]; has the entries of `layout`."""

    def update(
        self,
        merged: Params,
        alpha_ME: Array,
        bank: Params,
        state: Any,
        *,
        step: Array,
        lr: Array,
        good: Array | bool = True,
    ) -> tuple[Params, Any]:
        """(bank, state) after the gradient dE_e = sum_m alpha_me G_m.

        Args:
          merged: G_m, leaves [M, ...]; more leaves than the bank has.
          step: updates already applied, int32.
          lr: rate of the experts.
          good: where it is false nothing changes.
        """

    def reach(self, alpha_ME: Array) -> Array:
        """How far the experts move a merged model, in units of `lr`; for the metrics."""


BANK_OPTIMIZERS: Registry[Callable[[OptimizerConfig], BankOptimizer]] = Registry(
    "bank optimizer", {"merged": MergedSpace, "adamw": AdamW}
)
register = BANK_OPTIMIZERS.register


def bank_optimizer(config: OptimizerConfig) -> BankOptimizer:
    """The one that the settings name.

    Raises:
      UserError: no such optimizer.
    """
    return BANK_OPTIMIZERS.get(config.bank)(config)
