"""Optimizers of dense experts: a gradient in factored form in (see `soup`), the bank out.

- `adamw`: exact AdamW on every expert. Two moments of the bank's size.
- `merged`: preconditioned in the merged space. One second moment v, of the size of *one* model, of
  the summed gradient sum_m G_m; D_m = G_m / (sqrt(v) + eps); expert e moves by
  -lr * sum_m alpha_me D_m. Steps are proportional to alpha, so equal experts separate, and no
  expert has state of its own.
- `merged` with deferred updates (`flush_every` = T > 1): these updates are of rank M, so instead of
  rewriting all experts at every step the last T M directions D are kept beside the bank
  (see `pending`), and each step writes what is due to E / T of the experts in turn. No step
  costs more than another, and a step reads the bank twice and writes 1 / T of it.

Cost per step, in passes over the bank (reading it is one, writing it is another), with the two that
`soup` needs for the merge and for the coefficients' gradient:

    adamw             10: the experts' update reads both moments after they were written
    merged            4
    merged, deferred  2 + 2 / T, and 3 T M / E for reading the directions (merge, coefficients and
                      writing), M / E for keeping them; twice that beside a bfloat16 bank

So deferring pays while T M is well below E; T = sqrt(2 E / (3 M)) is the cheapest.
"""

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.optim import rounding
from soup_jax.rules import is_matrix
from soup_jax.shapes import Array, Params
from soup_jax.soup import bank as experts
from soup_jax.soup import merge
from soup_jax.soup import pending as pending_lib
from soup_jax.soup.pending import Pending


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
    pending: Callable[[Any], Pending | None] = lambda state: None
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
    """Whether weight decay applies to the leaf: matrices yes; norm scales and biases no."""
    return is_matrix(path, ndim)


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
    deferring = flush_every > 1

    def init(bank: Params) -> Any:
        state = {"nu": jax.tree.map(lambda x: jnp.zeros(x.shape[1:], moment_dtype), bank)}
        if deferring:
            paths = [path for path, x in tree.flatten(bank).items() if decays(path, x.ndim - 1)]
            num_slots = flush_every * num_mixtures
            late = pending_lib.nothing(bank, paths, num_slots=num_slots)
            state |= late._asdict()
        return state

    def pending(state: Any) -> Pending | None:
        return Pending(*(state[name] for name in Pending._fields)) if deferring else None

    def update(
        merged: Params,
        alpha_ME: Array,
        bank: Params,
        state: Any,
        step: Array,
        lr: Array,
        good: Array | bool = True,
    ) -> tuple[Params, Any]:
        keep = functools.partial(_keep, good=good, step=step, stochastic=stochastic)
        correct2 = 1 - beta2 ** (step.astype(jnp.float32) + 1)
        nu, direction_M = _directions(
            merged, state["nu"], correct2, beta2=beta2, eps=eps, keep=keep, good=good
        )
        weight_ME = jnp.where(good, lr * alpha_ME, 0.0)
        store = bank_store(step, stochastic)

        def eager(path: str, stack: Array) -> Array:
            decaying = decays(path, stack.ndim - 1)
            if deferring and decaying:
                return stack
            shrink = jnp.where(good, 1 - lr * weight_decay * decaying, 1.0)
            return _move(path, stack, direction_M[path], weight_ME, shrink, store)

        bank = tree.map_named(eager, bank)
        if not deferring:
            return bank, {"nu": nu}
        turn = step % flush_every
        late, shrink = pending(state), 1 - lr * weight_decay
        late = pending_lib.defer(late, direction_M, weight_ME, shrink=shrink, slot=turn, good=good)
        # In the turn that fills a slot: it is empty again when it is filled next, T turns later.
        bank, late = pending_lib.write_turn(
            late, bank, turn=turn, num_turns=flush_every, good=good, store=store
        )
        return bank, {"nu": nu, **late._asdict()}

    def flush(bank: Params, state: Any, step: Array) -> tuple[Params, Any]:
        if not deferring:
            return bank, state
        # A salt of its own: the next update has the same step number.
        store = bank_store(step, stochastic, salt="flush")
        bank, late = pending_lib.write_all(pending(state), bank, store=store)
        return bank, {**state, **late._asdict()}

    return BankOptimizer(init, update, pending, flush)


def _directions(
    merged: Params,
    nu: Params,
    correct2: Array,
    *,
    beta2: float,
    eps: float,
    keep: Callable[..., Array],
    good: Array | bool,
) -> tuple[Params, dict[str, Array]]:
    # (new second moment, D_M by path); D_M is zero if not `good`.
    gradients = tree.flatten(merged)

    def new_nu(path: str, old: Array) -> Array:
        square = jnp.square(merge.over_mixtures(gradients[path]))
        new = beta2 * old.astype(jnp.float32) + (1 - beta2) * square
        return keep(old, new, salt=f"nu/{path}")

    def directions(nu: Params) -> dict[str, Array]:
        return {
            path: gradients[path] / (jnp.sqrt(v.astype(jnp.float32) / correct2) + eps)
            for path, v in tree.flatten(nu).items()
        }

    def masked(nu: Params) -> dict[str, Array]:
        return jax.tree.map(lambda d: jnp.where(good, d, 0.0), directions(nu))

    def apart(nu: Params) -> dict[str, Array]:
        # A branch: else the loops over experts would compute them again for every expert.
        shapes = jax.eval_shape(directions, nu)
        zeros = jax.tree.map(lambda d: jnp.zeros(d.shape, d.dtype), shapes)
        return jax.lax.cond(good, directions, lambda nu: zeros, nu)

    # From what is stored of v, so that it is updated in place.
    nu = tree.map_named(new_nu, nu)
    return nu, jax.lax.platform_dependent(nu, cpu=apart, default=masked)


def _move(
    path: str,
    stack: Array,
    direction_M: Array,
    weight_ME: Array,
    shrink: Array,
    store: pending_lib.Store,
) -> Array:
    # shrink * E_e - sum_m weight_me D_m
    def functions(expert_sum: experts.ExpertSum) -> Sequence[Callable[..., Array]]:
        def new_expert(first: Array | int, expert: Array) -> Array:
            moved = expert_sum(weight_ME, direction_M, first, expert.shape[0])
            return store(path, shrink * expert.astype(jnp.float32) - moved, expert, first)

        return (new_expert,)

    return experts.update_stacks(functions, (stack,), num_terms=weight_ME.shape[0])[0]


def bank_store(step: Array, stochastic: bool, *, salt: str = "bank") -> pending_lib.Store:
    """How new experts are stored at a step: in their old dtype, rounded stochastically or not.

    Args:
      salt: tells writes of one step number apart.
    """

    def store(path: str, new: Array, old: Array, first: Array | int) -> Array:
        seed = _seed(step, f"{salt}/{path}") if stochastic else None
        return rounding.store(new, old.dtype, seed=seed, first=first)

    return store


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
