"""AdamW on every expert, from dE_e = sum_m alpha_me G_m, which is never whole.

Two moments of the bank's size, in `moment_dtype`. A step reads or writes something of the bank's
size ten times: the experts' update reads both moments after they were written.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from soup_jax import tree
from soup_jax.optim import rounding
from soup_jax.optim.config import OptimizerConfig
from soup_jax.shapes import Array, Params
from soup_jax.soup import kernels


class AdamW:
    """The bank optimizer "adamw"."""

    layout: ClassVar = {"mu": "experts", "nu": "experts"}
    bank_passes, state_passes = 2.0, 3.0

    def __init__(self, config: OptimizerConfig):
        """Reads betas, eps, weight_decay, moment_dtype and stochastic_rounding."""
        self._config = config

    def init(self, bank: Params) -> dict[str, Any]:
        """Both moments, zero."""
        return {
            name: jax.tree.map(lambda x: jnp.zeros(x.shape, self._config.moment_dtype), bank)
            for name in ("mu", "nu")
        }

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
        """See `bank.BankOptimizer`."""
        c = self._config
        gradients = tree.flatten(merged)
        count = step.astype(jnp.float32) + 1
        correct1, correct2 = 1 - c.beta1**count, 1 - c.beta2**count
        keep = functools.partial(
            rounding.keep, good=good, step=step, stochastic=c.stochastic_rounding
        )

        def leaf(path: str, *stacks: Array) -> tuple[Array, ...]:
            decay = c.weight_decay if tree.is_matrix(path, stacks[0].ndim - 1) else 0.0

            def functions(expert_sum: kernels.ExpertSum) -> Sequence[Callable[..., Array]]:
                def gradient(first: Array | int, like: Array) -> Array:
                    return expert_sum(alpha_ME, gradients[path], first, like.shape[0])

                def new_mu(first: Array | int, mu: Array, nu: Array, expert: Array) -> Array:
                    new = c.beta1 * mu.astype(jnp.float32) + (1 - c.beta1) * gradient(first, mu)
                    return keep(mu, new, first=first, name=f"mu/{path}")

                def new_nu(first: Array | int, mu: Array, nu: Array, expert: Array) -> Array:
                    square = jnp.square(gradient(first, nu))
                    new = c.beta2 * nu.astype(jnp.float32) + (1 - c.beta2) * square
                    return keep(nu, new, first=first, name=f"nu/{path}")

                def new_expert(first: Array | int, *blocks: Array) -> Array:
                    mu, nu, expert = (x.astype(jnp.float32) for x in blocks)
                    scale = jnp.sqrt(nu / correct2) + c.eps
                    direction = (mu / correct1) / scale + decay * expert
                    return keep(blocks[2], expert - lr * direction, first=first, name=path)

                return new_mu, new_nu, new_expert

            return kernels.update_stacks(functions, stacks, num_terms=alpha_ME.shape[0])

        new = tree.map_named(leaf, state["mu"], state["nu"], bank)
        return _pick(new, 2), {"mu": _pick(new, 0), "nu": _pick(new, 1)}

    def reach(self, alpha_ME: Array) -> Array:
        """||alpha||_1, averaged over mixtures: every expert moves by about the rate."""
        return jnp.abs(alpha_ME).sum(-1).mean()


def _pick(results: Any, index: int) -> Any:
    return jax.tree.map(lambda r: r[index], results, is_leaf=lambda r: isinstance(r, tuple))
