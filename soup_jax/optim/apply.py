"""The update of a whole soup: one schedule and one clipping norm for all of its parts.

optax moves the shared parameters and the router (see `shared`) and experts with explicit gradients.
A bank optimizer (see `bank`) moves experts whose gradients are factored.

With Adam every expert moves by about the learning rate, however small its coefficient. So the
merged weights move by about lr * (1 + scale * ||alpha||_1); with `merged` by lr * (1 + scale *
||alpha||_2^2). `effective_rate` in the metrics reports that factor. It leaves out experts with
explicit gradients, which have Adam always, unless there are no others.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from soup_jax import tree
from soup_jax.optim import rounding
from soup_jax.optim.bank import bank_optimizer
from soup_jax.optim.config import OptimizerConfig, schedule
from soup_jax.optim.shared import explicit_optimizer, shared_optimizer
from soup_jax.shapes import Array, Params
from soup_jax.soup.bank import kind_of
from soup_jax.soup.gradients import SoupGrads, squared_norms


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


def init_state(config: OptimizerConfig, params: Params) -> dict[str, Any]:
    """Optimizer state {"base": ..., "bank": {kind of experts: ...}} of a soup."""
    bank = {}
    for name, part in params["bank"].items():
        if kind_of(name).factored:
            bank[name] = bank_optimizer(config).init(part)
        else:
            bank[name] = explicit_optimizer(config).init(_float32(part))
    return {"base": shared_optimizer(config).init(_base(params)), "bank": bank}


def _base(params: Params) -> dict[str, Params]:
    return {"shared": params["shared"], "router": params["router"]}


def _float32(t: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), t)


def apply_update(
    config: OptimizerConfig,
    params: Params,
    state: Any,
    grads: SoupGrads,
    step: Array,
    *,
    good: Array | bool = True,
) -> tuple[Params, Any, Update]:
    """Clip by the global norm (experts included, in closed form) and update all parts.

    Nothing changes unless `good`, and unless the norm is finite.
    """
    norms = squared_norms(grads, params["bank"])
    norm = jnp.sqrt(sum(norms.values()))
    good = jnp.asarray(good) & jnp.isfinite(norm)
    clip = config.clip_norm
    scale = jnp.minimum(1.0, clip / (norm + 1e-12)) if clip else jnp.ones(())
    parts = grads._asdict()
    alpha_ME = parts.pop("alpha_ME")
    parts = jax.tree.map(lambda g: g * scale, parts)
    grads = SoupGrads(**parts, alpha_ME=alpha_ME)

    base = _base(params)
    with jax.named_scope("update_shared"):
        updates, base_state = shared_optimizer(config).update(
            {"shared": grads.shared, "router": grads.router}, state["base"], base
        )
        new = dict(optax.apply_updates(base, updates))
    new, base_state = jax.tree.map(
        lambda a, b: jnp.where(good, a, b), (new, base_state), (base, state["base"])
    )
    lr = schedule(config)(step)
    bank, bank_state = _update_bank(
        config, params["bank"], state["bank"], grads, step, lr=lr, good=good
    )
    info = Update(
        learning_rate=lr,
        grad_norm=norm,
        shared_norm=jnp.sqrt(norms["shared"]),
        bank_norm=jnp.sqrt(norms["bank"]),
        router_norm=jnp.sqrt(norms["router"]),
        effective_rate=_effective_rate(config, params["bank"], alpha_ME),
        good=good,
    )
    return {**new, "bank": bank}, {"base": base_state, "bank": bank_state}, info


@jax.named_scope("update_bank")
def _update_bank(
    config: OptimizerConfig,
    bank: Params,
    state: Any,
    grads: SoupGrads,
    step: Array,
    *,
    lr: Array,
    good: Array,
) -> tuple[dict[str, Params], dict[str, Any]]:
    new, new_state = {}, {}
    for name, part in bank.items():
        if not kind_of(name).factored:
            new[name], new_state[name] = _update_explicit(
                config, part, state[name], grads.explicit[name], step, good
            )
            continue
        # Left to itself a compiler repeats the schedule and the clipping inside the experts' loops.
        merged, alpha_ME, bank_lr, apply = jax.lax.optimization_barrier(
            (grads.merged, grads.alpha_ME, lr * config.bank_lr_scale, good)
        )
        new[name], new_state[name] = bank_optimizer(config).update(
            merged, alpha_ME, part, state[name], step=step, lr=bank_lr, good=apply
        )
    return new, new_state


def _update_explicit(
    config: OptimizerConfig, experts: Params, state: Any, grads: Params, step: Array, good: Array
) -> tuple[Params, Any]:
    exact = _float32(experts)
    updates, new_state = explicit_optimizer(config).update(grads, state, exact)

    def stored(path: str, old: Array, new: Array) -> Array:
        return rounding.keep(
            old,
            new,
            good=good,
            step=step,
            stochastic=config.stochastic_rounding,
            name=f"bank/{path}",
        )

    new = tree.map_named(stored, experts, optax.apply_updates(exact, updates))
    return new, jax.tree.map(lambda a, b: jnp.where(good, a, b), new_state, state)


def _effective_rate(config: OptimizerConfig, bank: Params, alpha_ME: Array) -> Array:
    if not bank:
        return jnp.ones(())
    factored = any(kind_of(name).factored for name in bank)
    reach = bank_optimizer(config).reach if factored else lambda a: jnp.abs(a).sum(-1).mean()
    return 1 + config.bank_lr_scale * reach(alpha_ME)
