"""Optimizers of the shared parameters and the router: optax transformations by name.

"adamw" and "muon" are here. "optax.NAME" is optax's own of that name, called with the schedule and
`optimizer.shared_args`, as in `--config.optimizer.shared=optax.lion`. A dotted path such as
"my_package.optim:chain" names a function of your own like those here.
"""

from collections.abc import Callable
from typing import Any

import optax
from optax import contrib

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.optim.config import OptimizerConfig, Schedule, schedule
from soup_jax.registry import Registry
from soup_jax.shapes import Array, Params

# (schedule, settings, *, weight_decay, **shared_args) -> a transformation whose updates include the
# rate; the decay is decoupled, for the leaves that `decays` names, and 0 for the router.
MakeOptimizer = Callable[..., optax.GradientTransformation]


def decays(params: Params) -> Params:
    """Mask of the leaves that weight decay applies to: matrices; not norm scales and biases."""
    return tree.map_named(lambda path, leaf: tree.is_matrix(path, leaf.ndim), params)


def adamw(
    rate: Schedule,
    config: OptimizerConfig,
    *,
    weight_decay: float,
    mask: Callable[[Params], Params] = decays,
) -> optax.GradientTransformation:
    """AdamW with the config's betas and eps."""
    return optax.adamw(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=weight_decay,
        mask=mask,
    )


def muon(
    rate: Schedule, config: OptimizerConfig, *, weight_decay: float, **args: Any
) -> optax.GradientTransformation:
    """Muon for matrices but embeddings, each layer of a stack by itself; Adam for the rest, with
    Nesterov's momentum, and without decay.

    `consistent_rms` = 0.2, unless `args` say otherwise, makes an update about as large as AdamW's,
    so that one learning rate serves both (Liu et al., "Muon is Scalable for LLM Training", 2025).
    """

    def dimensions(params: Params) -> Params:
        def leaf(path: str, x: Any) -> contrib.MuonDimensionNumbers | None:
            matrix = tree.is_matrix(path, x.ndim) and "embed" not in path
            # Orthogonalised over the last two dimensions, each layer of a stack by itself.
            return contrib.MuonDimensionNumbers(x.ndim - 2, x.ndim - 1) if matrix else None

        return tree.map_named(leaf, params)

    return contrib.muon(
        rate,
        weight_decay=weight_decay,
        weight_decay_mask=decays,
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        eps=config.eps,
        muon_weight_dimension_numbers=dimensions,
        **{"consistent_rms": 0.2} | args,
    )


SHARED_OPTIMIZERS: Registry[MakeOptimizer] = Registry(
    "optimizer of the shared parameters", {"adamw": adamw, "muon": muon}
)
register = SHARED_OPTIMIZERS.register


def _from_optax(name: str) -> Callable[..., optax.GradientTransformation]:
    function = getattr(optax, name, None)
    if not callable(function):
        raise UserError(
            f"optimizer.shared = 'optax.{name}': optax {optax.__version__} has no {name!r}"
        )
    return function


def shared_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """For the pytree {"shared": S, "router": ...}; the router has its own rate, and no decay.

    Raises:
      UserError: no such optimizer, or it does not take `shared_args`.
    """
    name = config.shared
    own = not name.startswith("optax.")
    rate, args = schedule(config), dict(config.shared_args)
    make = SHARED_OPTIMIZERS.get(name) if own else _from_optax(name.removeprefix("optax."))

    def part(scale: float, weight_decay: float) -> optax.GradientTransformation:
        def scaled(step: Array) -> Array:
            return scale * rate(step)

        try:
            if not own:  # its weight decay, too, is one of the arguments
                return make(scaled, **args)
            return make(scaled, config, weight_decay=weight_decay, **args)
        except TypeError as e:
            raise UserError(
                f"optimizer.shared = {name!r} with optimizer.shared_args = "
                f"{config.shared_args!r}: {e}"
            ) from e

    return optax.partition(
        {
            "shared": part(1.0, config.weight_decay),
            "router": part(config.router_lr_scale, 0.0),
        },
        {"shared": "shared", "router": "router"},
    )


def explicit_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """AdamW of experts with explicit gradients, at the experts' rate; moments are float32."""
    rate = schedule(config)

    def mask(experts: Params) -> Params:
        def leaf(path: str, x: Any) -> bool:
            # As the leaf decays that they belong to: what follows its path is a factor's name.
            own, parent = (tree.is_matrix(p, x.ndim - 1) for p in (path, path.rpartition("/")[0]))
            return own and parent

        return tree.map_named(leaf, experts)

    return adamw(
        lambda step: config.bank_lr_scale * rate(step),
        config,
        weight_decay=config.weight_decay,
        mask=mask,
    )
