"""Optimizers of a soup: optax for the shared parameters and the router, our own for the bank.

A bank optimizer takes the gradient in factored form (merged gradients G_m and coefficients
alpha_me, see `soup`) and gives back the bank:

- `adamw`: exact AdamW on every expert. Two moments of the bank's size.
- `merged`: preconditioned in the merged space. One second moment v, of the size of *one* model, of
  the summed gradient sum_m G_m; D_m = G_m / (sqrt(v) + eps); expert e moves by
  -lr * sum_m alpha_me D_m. Steps are proportional to alpha, so equal experts separate, and no
  expert has state of its own.

With Adam every expert moves by about the learning rate however small its coefficient, so the merged
weights move by about lr * (1 + scale * ||alpha||_1); with `merged` by lr * (1 + scale *
||alpha||_2^2). `effective_rate` in the metrics reports that factor.
"""

import functools
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from soup_jax import experts, rounding, soup, tree
from soup_jax.shapes import Array, Params

Schedule = Callable[[Array], Array]


class BankOptimizer(NamedTuple):
    """A pure pair of functions.

    Attributes:
      init: bank -> state.
      update: (merged gradients, alpha_ME, bank, state, step, lr, good) -> (bank, state); `step`
        counts the updates already applied, int32; `lr` is the rate of the experts; where `good` is
        false nothing changes.
    """

    init: Callable[[Params], Any]
    update: Callable[..., tuple[Params, Any]]


def schedule(cfg: ConfigDict) -> Schedule:
    """Learning rate of the shared parameters as a function of the updates already applied."""
    o = cfg.optimizer
    # Warm-up reaches its peak at `warmup_steps`; step 0 has a rate above zero, so no batch is lost.
    warmup = optax.linear_schedule(
        o.learning_rate / (o.warmup_steps + 1), o.learning_rate, max(o.warmup_steps, 1)
    )
    rest = max(cfg.num_steps - o.warmup_steps, 1)
    if o.schedule == "cosine":
        main = optax.cosine_decay_schedule(o.learning_rate, rest, o.final_fraction)
        return optax.join_schedules([warmup, main], [o.warmup_steps])
    flat = optax.constant_schedule(o.learning_rate)
    if o.schedule == "constant":
        return optax.join_schedules([warmup, flat], [o.warmup_steps])
    decay = optax.linear_schedule(
        o.learning_rate, o.learning_rate * o.final_fraction, max(o.decay_steps, 1)
    )
    start = max(cfg.num_steps - o.decay_steps, o.warmup_steps)
    return optax.join_schedules([warmup, flat, decay], [o.warmup_steps, start])


def decays(path: str, ndim: int) -> bool:
    """Whether weight decay applies to the leaf: matrices yes; norm scales and biases no.

    A stacked norm scale is two-dimensional, so the name decides for it.
    """
    return ndim >= 2 and not re.search(r"norm/scale$|bias$", path)


def _decay_mask(params: Params) -> Params:
    return tree.map_named(lambda path, leaf: decays(path, leaf.ndim), params)


def base_optimizer(cfg: ConfigDict) -> optax.GradientTransformation:
    """AdamW for the pytree {"shared": S, "router": ...}; the router has its own rate, no decay."""
    o = cfg.optimizer
    rate = schedule(cfg)

    def adamw(scale: float, weight_decay: float) -> optax.GradientTransformation:
        return optax.adamw(
            lambda step: scale * rate(step),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=weight_decay,
            mask=_decay_mask,
        )

    return optax.partition(
        {"shared": adamw(1.0, o.weight_decay), "router": adamw(o.router_lr_scale, 0.0)},
        {"shared": "shared", "router": "router"},
    )


def bank_optimizer(cfg: ConfigDict) -> BankOptimizer:
    """The bank optimizer of a config."""
    o = cfg.optimizer
    make = {"adamw": bank_adamw, "merged": bank_merged}[o.bank]
    options: dict[str, Any] = {"beta2": o.beta2, "eps": o.eps, "weight_decay": o.weight_decay}
    options["moment_dtype"] = o.moment_dtype
    options["stochastic"] = cfg.experts.rounding == "stochastic"
    if o.bank == "adamw":
        options["beta1"] = o.beta1
    return make(**options)


def bank_adamw(
    *,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    moment_dtype: str = "float32",
    stochastic: bool = True,
) -> BankOptimizer:
    """AdamW on every expert, from dE_e = sum_m alpha_me G_m formed block by block of experts.

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

            def gradient(first: Array | int, like: Array) -> Array:
                return _expert_sum(alpha_ME, gradients[path], first, like.shape[0])

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

            return experts.update_blocks(
                (new_mu, new_nu, new_expert), stacks, block_size=_block_size(alpha_ME)
            )

        new = tree.map_named(leaf, state["mu"], state["nu"], bank)
        return _pick(new, 2), {"mu": _pick(new, 0), "nu": _pick(new, 1)}

    return BankOptimizer(init, update)


def bank_merged(
    *,
    beta2: float,
    eps: float,
    weight_decay: float,
    moment_dtype: str = "float32",
    stochastic: bool = True,
) -> BankOptimizer:
    """Preconditioned in the merged space; state: one second moment per merged parameter.

    Args: as of `bank_adamw`.
    """

    def init(bank: Params) -> Any:
        return {"nu": jax.tree.map(lambda x: jnp.zeros(x.shape[1:], moment_dtype), bank)}

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

        def leaf(path: str, stack: Array, old_nu: Array) -> tuple[Array, Array]:
            g = gradients[path]
            decay = weight_decay if decays(path, stack.ndim - 1) else 0.0
            keep = functools.partial(_keep, good=good, step=step, stochastic=stochastic)
            nu = beta2 * old_nu.astype(jnp.float32) + (1 - beta2) * jnp.square(g.sum(0))
            direction_M = g / (jnp.sqrt(nu / correct2) + eps)

            def new_expert(first: Array | int, expert: Array) -> Array:
                moved = _expert_sum(alpha_ME, direction_M, first, expert.shape[0])
                new = expert.astype(jnp.float32) * (1 - lr * decay) - lr * moved
                return keep(expert, new, first=first, salt=path)

            (stack,) = experts.update_blocks(
                (new_expert,), (stack,), block_size=_block_size(alpha_ME)
            )
            return stack, keep(old_nu, nu, salt=f"nu/{path}")

        new = tree.map_named(leaf, bank, state["nu"])
        return _pick(new, 0), {"nu": _pick(new, 1)}

    return BankOptimizer(init, update)


def _block_size(alpha_ME: Array) -> int:
    # Every block reads the M merged gradients again: with 2 M experts a block, that is a quarter of
    # what reading and writing the experts costs.
    return max(8, 2 * alpha_ME.shape[0])


def _expert_sum(alpha_ME: Array, leaf_M: Array, first: Array | int, size: int) -> Array:
    alpha_ME = jax.lax.dynamic_slice_in_dim(alpha_ME, first, size, axis=1)
    return jnp.einsum("ME,M...->E...", alpha_ME, leaf_M, precision="highest")


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
    seed = rounding.make_seed(step, zlib.crc32(salt.encode())) if stochastic else None
    return jnp.where(good, rounding.store(new, old.dtype, seed=seed, first=first), old)


def _pick(results: Any, index: int) -> Any:
    return jax.tree.map(lambda r: r[index], results, is_leaf=lambda r: isinstance(r, tuple))


class Update(NamedTuple):
    """What `apply_update` returns beside the parameters: float32 scalars for the metrics, and
    `good`, whether the update was applied."""

    learning_rate: Array
    grad_norm: Array
    shared_norm: Array
    bank_norm: Array
    router_norm: Array
    effective_rate: Array
    good: Array


def init_state(cfg: ConfigDict, params: Params) -> dict[str, Any]:
    """Optimizer state {"base": ..., "bank": ...} of a soup."""
    base = {"shared": params["shared"], "router": params["router"]}
    return {
        "base": base_optimizer(cfg).init(base),
        "bank": bank_optimizer(cfg).init(params["bank"]) if params["bank"] else {},
    }


def apply_update(
    cfg: ConfigDict,
    params: Params,
    state: Any,
    grads: soup.SoupGrads,
    step: Array,
    *,
    good: Array | bool = True,
) -> tuple[Params, Any, Update]:
    """Clip by the global norm (experts included, in closed form) and update all parts.

    Nothing changes unless `good`, and unless the norm is finite.
    """
    o = cfg.optimizer
    norms = soup.squared_norms(grads, list(tree.flatten(params["bank"])))
    norm = jnp.sqrt(sum(norms.values()))
    good = jnp.asarray(good) & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, o.clip_norm / (norm + 1e-12)) if o.clip_norm else jnp.ones(())
    grads = grads._replace(
        shared=jax.tree.map(lambda g: g * scale, grads.shared),
        router=jax.tree.map(lambda g: g * scale, grads.router),
        merged=jax.tree.map(lambda g: g * scale, grads.merged),
    )
    base = {"shared": params["shared"], "router": params["router"]}
    updates, base_state = base_optimizer(cfg).update(
        {"shared": grads.shared, "router": grads.router}, state["base"], base
    )
    new = dict(optax.apply_updates(base, updates))
    new, base_state = jax.tree.map(
        lambda a, b: jnp.where(good, a, b), (new, base_state), (base, state["base"])
    )
    lr = schedule(cfg)(step)
    bank, bank_state, factor = params["bank"], state["bank"], jnp.ones(())
    if bank:
        bank, bank_state = bank_optimizer(cfg).update(
            grads.merged, grads.alpha_ME, bank, bank_state, step, lr * o.bank_lr_scale, good
        )
        power = jnp.abs if o.bank == "adamw" else jnp.square
        factor = 1 + o.bank_lr_scale * power(grads.alpha_ME).sum(-1).mean()
    info = Update(
        learning_rate=lr,
        grad_norm=norm,
        shared_norm=jnp.sqrt(norms["shared"]),
        bank_norm=jnp.sqrt(norms["bank"]),
        router_norm=jnp.sqrt(norms["router"]),
        effective_rate=factor,
        good=good,
    )
    return {**new, "bank": bank}, {"base": base_state, "bank": bank_state}, info
