"""Optimizers of the bank: a gradient in factored form in (see `soup`), the bank out.

- `adamw`: exact AdamW on every expert. Two moments of the bank's size.
- `merged`: preconditioned in the merged space. One second moment v, of the size of *one* model, of
  the summed gradient sum_m G_m; D_m = G_m / (sqrt(v) + eps); expert e moves by
  -lr * sum_m alpha_me D_m. Steps are proportional to alpha, so equal experts separate, and no
  expert has state of its own.
- `merged` with deferred updates (`flush_every` = T > 1): these updates are of rank M, so instead of
  rewriting all experts at every step the last T M directions D are kept beside the bank
  (`merge.Pending`), and each step writes what is due to E / T of the experts in turn. No step
  costs more than another, and a step reads the bank twice and writes 1 / T of it.

Cost per step, in passes over the bank (reading it is one, writing it is another), with the two that
`soup` needs for the merge and for the coefficients' gradient:

    adamw             8 on accelerators if the compiler fuses the three writes; 10 if not (CPUs)
    merged            4
    merged, deferred  2 + 2 / T, and 2 T M / E for reading the directions, M / E for writing them

So deferring pays while T M is well below E; T = sqrt(E / M) is the cheapest.
"""

import functools
import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from soup_jax import experts, merge, rounding, tree
from soup_jax.shapes import Array, Params


class BankOptimizer(NamedTuple):
    """Pure functions.

    Attributes:
      init: bank -> state.
      update: (merged gradients, alpha_ME, bank, state, step, lr, good) -> (bank, state); `step`
        counts the updates already applied, int32; `lr` is the rate of the experts; where `good` is
        false nothing changes.
      pending: state -> what the bank lacks, or None if it never lacks anything.
      flush: (bank, state, step) -> (bank, state), nothing pending.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]
    pending: Callable[[Any], merge.Pending | None] = lambda state: None
    flush: Callable[[Params, Any, Array], tuple[Params, Any]] = lambda bank, state, step: (
        bank,
        state,
    )


def from_config(cfg: ConfigDict) -> BankOptimizer:
    """The bank optimizer of a config."""
    o = cfg.optimizer
    options: dict[str, Any] = {"beta2": o.beta2, "eps": o.eps, "weight_decay": o.weight_decay}
    options["moment_dtype"] = o.moment_dtype
    options["stochastic"] = cfg.experts.rounding == "stochastic"
    if o.bank == "adamw":
        return adamw(beta1=o.beta1, **options)
    return merged(flush_every=o.flush_every, num_mixtures=cfg.num_mixtures, **options)


def decays(path: str, ndim: int) -> bool:
    """Whether weight decay applies to the leaf: matrices yes; norm scales and biases no.

    A stacked norm scale is two-dimensional, so the name decides for it.
    """
    return ndim >= 2 and not re.search(r"norm/scale$|bias$", path)


def adamw(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    moment_dtype: str = "float32",
    stochastic: bool = True,
) -> BankOptimizer:
    """AdamW on every expert, from dE_e = sum_m alpha_me G_m, which is never whole.

    Args:
      moment_dtype: storage of both moments: float32 or bfloat16.
      stochastic: rounding of what is stored in bfloat16 (see `rounding`); else to the nearest.
    """

    def init(bank: Params) -> Any:
        return {
            name: jax.tree.map(lambda x: jnp.zeros(x.shape, moment_dtype), bank)
            for name in ("mu", "nu")
        }

    def update(
        merged: Params,
        alpha_ME: Array,
        bank: Params,
        state: Any,
        step: Array,
        lr: Array,
        good: Array | bool = True,
    ) -> tuple[Params, Any]:
        gradients = tree.flatten(merged)
        count = step.astype(jnp.float32) + 1
        correct1, correct2 = 1 - beta1**count, 1 - beta2**count

        def leaf(path: str, *stacks: Array) -> tuple[Array, ...]:
            decay = weight_decay if decays(path, stacks[0].ndim - 1) else 0.0
            keep = functools.partial(_keep, good=good, step=step, stochastic=stochastic)

            def functions(expert_sum: experts.ExpertSum) -> Sequence[Callable[..., Array]]:
                def gradient(first: Array | int, like: Array) -> Array:
                    return expert_sum(alpha_ME, gradients[path], first, like.shape[0])

                def new_mu(first: Array | int, mu: Array, nu: Array, expert: Array) -> Array:
                    new = beta1 * mu.astype(jnp.float32) + (1 - beta1) * gradient(first, mu)
                    return keep(mu, new, first=first, salt=f"mu/{path}")

                def new_nu(first: Array | int, mu: Array, nu: Array, expert: Array) -> Array:
                    square = jnp.square(gradient(first, nu))
                    new = beta2 * nu.astype(jnp.float32) + (1 - beta2) * square
                    return keep(nu, new, first=first, salt=f"nu/{path}")

                def new_expert(first: Array | int, *blocks: Array) -> Array:
                    mu, nu, expert = (x.astype(jnp.float32) for x in blocks)
                    direction = (mu / correct1) / (jnp.sqrt(nu / correct2) + eps) + decay * expert
                    return keep(blocks[2], expert - lr * direction, first=first, salt=path)

                return new_mu, new_nu, new_expert

            return experts.update_stacks(functions, stacks, num_terms=alpha_ME.shape[0])

        new = tree.map_named(leaf, state["mu"], state["nu"], bank)
        return _pick(new, 2), {"mu": _pick(new, 0), "nu": _pick(new, 1)}

    return BankOptimizer(init, update)


def merged(
    *,
    beta2: float,
    eps: float,
    weight_decay: float,
    moment_dtype: str = "float32",
    stochastic: bool = True,
    flush_every: int = 1,
    num_mixtures: int = 1,
) -> BankOptimizer:
    """Preconditioned in the merged space; state: one second moment per merged parameter, and with
    deferred updates T M directions of the same size, float32.

    Leaves without weight decay (norm scales, biases: small ones) are never deferred.

    Args:
      flush_every: T; 1 writes every update at once.
      num_mixtures: M; read only if T > 1.
      others: as of `adamw`.
    """
    num_slots = flush_every * num_mixtures
    deferring = flush_every > 1

    def deferred(path: str, stack: Array) -> bool:
        return deferring and decays(path, stack.ndim - 1)

    def init(bank: Params) -> Any:
        state = {"nu": jax.tree.map(lambda x: jnp.zeros(x.shape[1:], moment_dtype), bank)}
        if deferring:
            stacks = tree.flatten(bank)
            state["directions"] = tree.unflatten(
                {
                    path: jnp.zeros((num_slots, *x.shape[1:]), jnp.float32)
                    for path, x in stacks.items()
                    if deferred(path, x)
                }
            )
            num = experts.num_experts(bank)
            state["weight_SE"] = jnp.zeros((num_slots, num))
            state["scale_E"] = jnp.ones((num,))
        return state

    def pending(state: Any) -> merge.Pending | None:
        if not deferring:
            return None
        return merge.Pending(state["directions"], state["weight_SE"], state["scale_E"])

    def update(
        merged: Params,
        alpha_ME: Array,
        bank: Params,
        state: Any,
        step: Array,
        lr: Array,
        good: Array | bool = True,
    ) -> tuple[Params, Any]:
        gradients = tree.flatten(merged)
        correct2 = 1 - beta2 ** (step.astype(jnp.float32) + 1)
        keep = functools.partial(_keep, good=good, step=step, stochastic=stochastic)

        def new_nu(path: str, old: Array) -> Array:
            square = jnp.square(gradients[path].sum(0))
            new = beta2 * old.astype(jnp.float32) + (1 - beta2) * square
            return keep(old, new, salt=f"nu/{path}")

        def inverse_root(nu: Array) -> Array:
            return 1 / (jnp.sqrt(nu.astype(jnp.float32) / correct2) + eps)

        # From what is stored, so that v is updated in place. The barrier keeps the division out of
        # the experts' update, where it would be done once an expert.
        nu = tree.map_named(new_nu, state["nu"])
        direction_M = {
            path: gradients[path] * inverse_root(v) for path, v in tree.flatten(nu).items()
        }
        direction_M = jax.lax.optimization_barrier(direction_M)

        def eager(path: str, stack: Array) -> Array:
            decay = weight_decay if decays(path, stack.ndim - 1) else 0.0

            def functions(expert_sum: experts.ExpertSum) -> Sequence[Callable[..., Array]]:
                def new_expert(first: Array | int, expert: Array) -> Array:
                    moved = expert_sum(lr * alpha_ME, direction_M[path], first, expert.shape[0])
                    new = expert.astype(jnp.float32) * (1 - lr * decay) - moved
                    return keep(expert, new, first=first, salt=path)

                return (new_expert,)

            return experts.update_stacks(functions, (stack,), num_terms=alpha_ME.shape[0])[0]

        if not deferring:
            return tree.map_named(eager, bank), {"nu": nu}
        slot = step % flush_every
        rows = slot * alpha_ME.shape[0]

        def new_directions(path: str, old: Array) -> Array:
            row = jax.lax.dynamic_slice_in_dim(old, rows, alpha_ME.shape[0])
            new = jnp.where(good, direction_M[path], row)
            return jax.lax.dynamic_update_slice_in_dim(old, new, rows, 0)

        shrink = 1 - lr * weight_decay
        weight_SE = jax.lax.dynamic_update_slice_in_dim(
            shrink * state["weight_SE"], lr * alpha_ME, rows, 0
        )
        weight_SE = jnp.where(good, weight_SE, state["weight_SE"])
        scale_E = jnp.where(good, shrink * state["scale_E"], state["scale_E"])
        directions = tree.map_named(new_directions, state["directions"])
        now = merge.Pending(directions, weight_SE, scale_E)
        # The experts of a slot are written in the step that fills it, so T steps later, when the
        # slot is filled again, nothing of it is pending for any expert.
        size = -(-scale_E.shape[0] // flush_every)
        first = jnp.minimum(slot * size, scale_E.shape[0] - size)

        def leaf(path: str, stack: Array) -> Array:
            if not deferred(path, stack):
                return eager(path, stack)
            settle = _settle(path, now, step=step, stochastic=stochastic, good=good)
            return experts.update_block(settle, stack, first, size, num_terms=num_slots)

        written = (jnp.arange(scale_E.shape[0]) - first) // size == 0
        written = written & good
        return tree.map_named(leaf, bank), {
            "nu": nu,
            "directions": directions,
            "weight_SE": jnp.where(written, 0.0, weight_SE),
            "scale_E": jnp.where(written, 1.0, scale_E),
        }

    def flush(bank: Params, state: Any, step: Array) -> tuple[Params, Any]:
        now = pending(state)
        if now is None:
            return bank, state

        def leaf(path: str, stack: Array) -> Array:
            if not deferred(path, stack):
                return stack
            settle = _settle(path, now, step=step, stochastic=stochastic)
            return experts.update_stacks(settle, (stack,), num_terms=num_slots)[0]

        return tree.map_named(leaf, bank), {
            **state,
            "weight_SE": jnp.zeros_like(state["weight_SE"]),
            "scale_E": jnp.ones_like(state["scale_E"]),
        }

    return BankOptimizer(init, update, pending, flush)


def _settle(
    path: str, now: merge.Pending, *, step: Array, stochastic: bool, good: Array | bool = True
) -> Callable[[experts.ExpertSum], Sequence[Callable[..., Array]]]:
    # Writes to experts what is pending for them; 1 * expert - 0 if not `good`.
    direction_S = tree.flatten(now.directions)[path]
    scale_E = jnp.where(good, now.scale_E, 1.0)
    weight_SE = jnp.where(good, now.weight_SE, 0.0)

    def functions(expert_sum: experts.ExpertSum) -> Sequence[Callable[..., Array]]:
        def new_expert(first: Array | int, expert: Array) -> Array:
            size = expert.shape[0]
            scale = experts.columns(scale_E[None], first, size).reshape(
                size, *[1] * (expert.ndim - 1)
            )
            moved = expert_sum(weight_SE, direction_S, first, size)
            new = scale * expert.astype(jnp.float32) - moved
            # A salt of its own: a flush may come between two updates of one step number.
            seed = _seed(step, f"settle/{path}") if stochastic else None
            return rounding.store(new, expert.dtype, seed=seed, first=first)

        return (new_expert,)

    return functions


def _keep(
    old: Array,
    new: Array,
    *,
    good: Array | bool,
    step: Array,
    stochastic: bool,
    salt: str,
    first: Array | int = 0,
) -> Array:
    # What is stored of float32 values: rounded to the old ones' dtype; the old ones if not `good`.
    seed = _seed(step, salt) if stochastic else None
    return jnp.where(good, rounding.store(new, old.dtype, seed=seed, first=first), old)


def _seed(step: Array, salt: str) -> Array:
    return rounding.make_seed(step, zlib.crc32(salt.encode()))


def _pick(results: Any, index: int) -> Any:
    return jax.tree.map(lambda r: r[index], results, is_leaf=lambda r: isinstance(r, tuple))
