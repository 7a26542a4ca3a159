"""Experts preconditioned in the merged space: the bank has no state of its size.

There is one second moment v, of the size of *one* model, of the summed gradient sum_m G_m. Expert e
moves by -lr * sum_m alpha_me D_m, where D_m = G_m / (sqrt(v) + eps). Steps are proportional to
alpha, so equal experts separate. A step reads the bank three times (for the merge, for the
coefficients' gradient and here) and writes it once.

D_m is cut at `bank_step_bound`, for where the gradients of mixtures cancel v says nothing of one of
them. A mixture that is alone does not get there by default: its |D| is at most 1 / sqrt(1 - beta2),
4.47 for 0.95.
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


class MergedSpace:
    """The bank optimizer "merged"."""

    layout: ClassVar = {"nu": "merged"}
    bank_passes, state_passes = 2.0, 2.0

    def __init__(self, config: OptimizerConfig):
        """Reads beta2, eps, weight_decay, bank_step_bound, moment_dtype, stochastic_rounding."""
        self._config = config

    def init(self, bank: Params) -> dict[str, Any]:
        """The second moment, zero."""
        dtype = self._config.moment_dtype
        return {"nu": jax.tree.map(lambda x: jnp.zeros(x.shape[1:], dtype), bank)}

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
        keep = functools.partial(
            rounding.keep, good=good, step=step, stochastic=c.stochastic_rounding
        )
        correct2 = 1 - c.beta2 ** (step.astype(jnp.float32) + 1)
        gradients = tree.flatten(merged)

        def new_nu(path: str, old: Array) -> Array:
            square = jnp.square(kernels.over_mixtures(gradients[path]))
            new = c.beta2 * old.astype(jnp.float32) + (1 - c.beta2) * square
            return keep(old, new, name=f"nu/{path}")

        def directions(nu: Params) -> dict[str, Array]:
            bound = c.bank_step_bound or jnp.inf
            return {
                path: jnp.clip(
                    gradients[path] / (jnp.sqrt(v.astype(jnp.float32) / correct2) + c.eps),
                    -bound,
                    bound,
                )
                for path, v in tree.flatten(nu).items()
            }

        # From what is stored of v, so that it is updated in place.
        nu = tree.map_named(new_nu, state["nu"])
        direction_M = kernels.computed_once(directions, nu, good=good)
        weight_ME = jnp.where(good, lr * alpha_ME, 0.0)

        def moved(path: str, stack: Array) -> Array:
            decays = tree.is_matrix(path, stack.ndim - 1)
            shrink = jnp.where(good, 1 - lr * c.weight_decay * decays, 1.0)
            seed = rounding.seed_of(step, f"bank/{path}") if c.stochastic_rounding else None

            def functions(expert_sum: kernels.ExpertSum) -> Sequence[Callable[..., Array]]:
                def new_expert(first: Array | int, expert: Array) -> Array:
                    moves = expert_sum(weight_ME, direction_M[path], first, expert.shape[0])
                    new = shrink * expert.astype(jnp.float32) - moves
                    return rounding.store(new, expert.dtype, seed=seed, first=first)

                return (new_expert,)

            terms = weight_ME.shape[0]
            return kernels.update_stacks(functions, (stack,), num_terms=terms)[0]

        return tree.map_named(moved, bank), {"nu": nu}

    def reach(self, alpha_ME: Array) -> Array:
        """||alpha||_2^2, averaged over mixtures: expert e moves by alpha_e times the rate."""
        return jnp.square(alpha_ME).sum(-1).mean()
