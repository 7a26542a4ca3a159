"""The update of a whole soup: optax for the shared parameters, the router and low-rank factors,
`bank_optimizer` for dense experts, one schedule and one clipping norm for all.

With Adam every expert moves by about the learning rate however small its coefficient, so the merged
weights move by about lr * (1 + scale * ||alpha||_1); with `merged` by lr * (1 + scale *
||alpha||_2^2). `effective_rate` in the metrics reports that factor, of low-rank experts, which
have Adam always, only if there are no dense ones.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.optim import bank as bank_optimizer
from soup_jax.optim.bank import decays
from soup_jax.shapes import Array, Params
from soup_jax.soup import gradients as soup
from soup_jax.soup import low_rank
from soup_jax.soup.pending import Pending

Schedule = Callable[[Array], Array]


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


def _decay_mask(params: Params) -> Params:
    return tree.map_named(lambda path, leaf: decays(path, leaf.ndim), params)


def _factor_decay_mask(factors: Params) -> Params:
    # As the leaf that the factors belong to decays.
    return tree.map_named(lambda path, x: decays(path.rpartition("/")[0], x.ndim - 1), factors)


def _adamw(
    cfg: ConfigDict, scale: float, weight_decay: float, mask: Callable[[Params], Params]
) -> optax.GradientTransformation:
    o, rate = cfg.optimizer, schedule(cfg)
    return optax.adamw(
        lambda step: scale * rate(step),
        b1=o.beta1,
        b2=o.beta2,
        eps=o.eps,
        weight_decay=weight_decay,
        mask=mask,
    )


def base_optimizer(cfg: ConfigDict) -> optax.GradientTransformation:
    """AdamW for the pytree {"shared": S, "router": ...}; the router has its own rate, no decay."""
    o = cfg.optimizer
    return optax.partition(
        {
            "shared": _adamw(cfg, 1.0, o.weight_decay, _decay_mask),
            "router": _adamw(cfg, o.router_lr_scale, 0.0, _decay_mask),
        },
        {"shared": "shared", "router": "router"},
    )


def factor_optimizer(cfg: ConfigDict) -> optax.GradientTransformation:
    """AdamW of low-rank factors, with the experts' rate; moments are float32."""
    o = cfg.optimizer
    return _adamw(cfg, o.bank_lr_scale, o.weight_decay, _factor_decay_mask)


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
    """Optimizer state {"base": ..., "bank": ...} of a soup.

    That of the bank is the bank optimizer's for dense experts, and "factors" for low-rank ones.
    """
    base = {"shared": params["shared"], "router": params["router"]}
    dense, factors = low_rank.split(params["bank"], params["shared"])
    bank = bank_optimizer.from_config(cfg).init(dense) if dense else {}
    if factors:
        bank["factors"] = factor_optimizer(cfg).init(_float32(factors))
    return {"base": base_optimizer(cfg).init(base), "bank": bank}


def _float32(t: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), t)


def _has_dense(bank_state: Any) -> bool:
    return any(name != "factors" for name in bank_state)


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
    dense, factors = low_rank.split(params["bank"], params["shared"])
    norms = soup.squared_norms(grads, list(tree.flatten(dense)))
    norm = jnp.sqrt(sum(norms.values()))
    good = jnp.asarray(good) & jnp.isfinite(norm)
    scale = jnp.minimum(1.0, o.clip_norm / (norm + 1e-12)) if o.clip_norm else jnp.ones(())
    grads = grads._replace(
        shared=jax.tree.map(lambda g: g * scale, grads.shared),
        router=jax.tree.map(lambda g: g * scale, grads.router),
        merged=jax.tree.map(lambda g: g * scale, grads.merged),
        factors=jax.tree.map(lambda g: g * scale, grads.factors),
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
    bank_state, factor = {}, jnp.ones(())
    if dense:
        # Left to itself a compiler repeats the schedule and the clipping inside the experts' loops.
        inputs = jax.lax.optimization_barrier(
            (grads.merged, grads.alpha_ME, lr * o.bank_lr_scale, good)
        )
        merged, alpha_ME, bank_lr, apply = inputs
        dense, bank_state = bank_optimizer.from_config(cfg).update(
            merged, alpha_ME, dense, state["bank"], step, bank_lr, apply
        )
    if factors:
        factors, bank_state["factors"] = _update_factors(
            cfg, factors, state["bank"]["factors"], grads.factors, step, good
        )
    if params["bank"]:
        power = jnp.square if dense and o.bank == "merged" else jnp.abs
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
    bank = low_rank.join(dense, factors)
    return {**new, "bank": bank}, {"base": base_state, "bank": bank_state}, info


def _update_factors(
    cfg: ConfigDict, factors: Params, state: Any, grads: Params, step: Array, good: Array
) -> tuple[Params, Any]:
    exact = _float32(factors)
    updates, new_state = factor_optimizer(cfg).update(grads, state, exact)
    store = bank_optimizer.bank_store(step, cfg.experts.rounding == "stochastic")

    def stored(path: str, old: Array, new: Array) -> Array:
        return jnp.where(good, store(path, new, old, 0), old)

    new = tree.map_named(stored, factors, optax.apply_updates(exact, updates))
    return new, jax.tree.map(lambda a, b: jnp.where(good, a, b), new_state, state)


def pending(cfg: ConfigDict, state: Any) -> Pending | None:
    """Updates that the bank lacks, of an optimizer state; None if it never lacks any."""
    if not _has_dense(state["bank"]):
        return None
    return bank_optimizer.from_config(cfg).pending(state["bank"])


def flush(cfg: ConfigDict, params: Params, state: Any, step: Array) -> tuple[Params, Any]:
    """Parameters and optimizer state with all pending updates written to the bank."""
    if not _has_dense(state["bank"]):
        return params, state
    dense, factors = low_rank.split(params["bank"], params["shared"])
    dense, bank_state = bank_optimizer.from_config(cfg).flush(dense, state["bank"], step)
    return {**params, "bank": low_rank.join(dense, factors)}, {**state, "bank": bank_state}
