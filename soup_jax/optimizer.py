"""The update of a whole soup: optax for the shared parameters and the router, `bank_optimizer` for
the experts, one schedule and one clipping norm for all three.

With Adam every expert moves by about the learning rate however small its coefficient, so the merged
weights move by about lr * (1 + scale * ||alpha||_1); with `merged` by lr * (1 + scale *
||alpha||_2^2). `effective_rate` in the metrics reports that factor.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from soup_jax import bank_optimizer, soup, tree
from soup_jax.bank_optimizer import decays
from soup_jax.pending import Pending
from soup_jax.shapes import Array, Params

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
        "bank": bank_optimizer.from_config(cfg).init(params["bank"]) if params["bank"] else {},
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
        # Left to itself a compiler repeats the schedule and the clipping inside the experts' loops.
        inputs = jax.lax.optimization_barrier(
            (grads.merged, grads.alpha_ME, lr * o.bank_lr_scale, good)
        )
        merged, alpha_ME, bank_lr, apply = inputs
        bank, bank_state = bank_optimizer.from_config(cfg).update(
            merged, alpha_ME, bank, bank_state, step, bank_lr, apply
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


def pending(cfg: ConfigDict, state: Any) -> Pending | None:
    """Updates that the bank lacks, of an optimizer state; None if it never lacks any."""
    if not state["bank"]:
        return None
    return bank_optimizer.from_config(cfg).pending(state["bank"])


def flush(cfg: ConfigDict, params: Params, state: Any, step: Array) -> tuple[Params, Any]:
    """Parameters and optimizer state with all pending updates written to the bank."""
    if not state["bank"]:
        return params, state
    bank, bank_state = bank_optimizer.from_config(cfg).flush(params["bank"], state["bank"], step)
    return {**params, "bank": bank}, {**state, "bank": bank_state}
