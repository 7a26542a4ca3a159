"""The train state: parameters, optimizer state, the step, and the step of a failure, if any."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from soup_jax import soup, tree
from soup_jax.models.base import BaseModel
from soup_jax.optim import apply
from soup_jax.optim.bank import bank_optimizer
from soup_jax.optim.config import OptimizerConfig
from soup_jax.shapes import Array, Params
from soup_jax.soup import SoupConfig, layout
from soup_jax.soup.bank import kind_of


class TrainState(NamedTuple):
    """Everything a step changes: arrays, or what describes them, such as shardings.

    Attributes:
      params: the soup.
      opt_state: {"base": optax state, "bank": {kind of experts: state}}.
      step: updates already applied, int32.
      bad_step: the first step whose loss or gradient was not finite, or -1. From then on no update
        is applied: the state is that before the bad step, whenever the host notices.
    """

    params: Params
    opt_state: Any
    step: Any
    bad_step: Any


def make_init(
    config: SoupConfig,
    optimizer: OptimizerConfig,
    model: BaseModel,
    *,
    seed: int,
    frequencies_K: np.ndarray,
    centroids_KC: np.ndarray | None = None,
) -> Callable[..., TrainState]:
    """() -> TrainState, traceable, from the seed; a call may give another one, traced or not."""

    def init(seed: Array | int = seed) -> TrainState:
        params = soup.init(
            jax.random.key(seed),
            model.init,
            config,
            frequencies_K=frequencies_K,
            centroids_KC=centroids_KC,
        )
        return TrainState(
            params=params,
            opt_state=apply.init_state(optimizer, params),
            step=jnp.zeros((), jnp.int32),
            bad_step=jnp.full((), -1, jnp.int32),
        )

    return init


def state_shardings(mesh: Mesh, abstract: TrainState, optimizer: OptimizerConfig) -> TrainState:
    """Where each leaf of the state is stored: sliced over all devices, the bank within experts."""
    replicated = layout.replicated(mesh)

    # The router's parameters are on every device, and so are their moments: sliced ones would make
    # every step gather the router's update.
    def base(path: str, leaf: Any) -> Any:
        return replicated if "/router/" in f"/{path}/" else layout.storage(mesh, leaf)

    def everywhere(t: Any) -> Any:
        return jax.tree.map(lambda _: replicated, t)

    lay: dict[str, Callable[[Any], Any]] = {
        "experts": functools.partial(layout.storage, mesh, leading=1),
        "merged": functools.partial(layout.storage, mesh),
        "everywhere": everywhere,
    }
    said = bank_optimizer(optimizer).layout

    def bank_state(kind: str, state: Any) -> Any:
        if not kind_of(kind).factored:
            return lay["experts"](state)  # scalars among it have no dimension to cut
        return {name: lay[said[name]](t) for name, t in state.items()}

    params = abstract.params
    return TrainState(
        params={
            "shared": layout.storage(mesh, params["shared"]),
            "bank": layout.storage(mesh, params["bank"], leading=1),
            "router": everywhere(params["router"]),
        },
        opt_state={
            "base": tree.map_named(base, abstract.opt_state["base"]),
            "bank": {k: bank_state(k, state) for k, state in abstract.opt_state["bank"].items()},
        },
        step=replicated,
        bad_step=replicated,
    )


def abstract_with_shardings(abstract: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs that carry their shardings: the target of a restore."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings
    )
