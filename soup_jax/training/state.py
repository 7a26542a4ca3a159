"""The train state: parameters, optimizer state, the step, and the step of a failure, if any."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.models.base import BaseModel
from soup_jax.optim import apply as optimizer
from soup_jax.shapes import Array, Params
from soup_jax.soup import gradients as soup
from soup_jax.soup import layout as sharding
from soup_jax.soup import low_rank


class TrainState(NamedTuple):
    """Everything a step changes.

    Attributes:
      params: the soup.
      opt_state: {"base": optax state, "bank": bank optimizer state}.
      step: updates already applied, int32.
      bad_step: the first step whose loss or gradient was not finite, or -1. From then on no update
        is applied: the state is that before the bad step, whenever the host notices.
    """

    params: Params
    opt_state: Any
    step: Array
    bad_step: Array


def make_init(
    cfg: ConfigDict,
    model: BaseModel,
    *,
    frequencies_K: np.ndarray,
    centroids_KC: np.ndarray | None = None,
) -> Any:
    """() -> TrainState, traceable, from the config's seed."""
    config = soup.soup_config(cfg)

    def init() -> TrainState:
        params = soup.init(
            jax.random.key(cfg.seed),
            model.init,
            config,
            frequencies_K=frequencies_K,
            centroids_KC=centroids_KC,
        )
        return TrainState(
            params=params,
            opt_state=optimizer.init_state(cfg, params),
            step=jnp.zeros((), jnp.int32),
            bad_step=jnp.full((), -1, jnp.int32),
        )

    return init


def state_shardings(mesh: Mesh, abstract: TrainState) -> TrainState:
    """Where each leaf of the state is stored: sliced over all devices, the bank within experts."""
    replicated = sharding.replicated(mesh)
    dense, _ = low_rank.split(abstract.params["bank"], abstract.params["shared"])

    def bank(t: Any) -> Any:
        return sharding.storage(mesh, t, leading=1)

    # The router's parameters are on every device, and so are their moments: sliced ones would make
    # every step gather the router's update.
    def base(path: str, leaf: Any) -> Any:
        return replicated if "/router/" in f"/{path}/" else sharding.storage(mesh, leaf)

    def bank_state(name: str, t: Any) -> Any:
        if name in ("weight_SE", "scale_E"):
            return replicated
        if name in ("directions", "factors") or _has_experts(t, dense):
            return bank(t)
        return sharding.storage(mesh, t)

    return TrainState(
        params={
            "shared": sharding.storage(mesh, abstract.params["shared"]),
            "bank": bank(abstract.params["bank"]),
            "router": jax.tree.map(lambda _: replicated, abstract.params["router"]),
        },
        opt_state={
            "base": tree.map_named(base, abstract.opt_state["base"]),
            "bank": {name: bank_state(name, t) for name, t in abstract.opt_state["bank"].items()},
        },
        step=replicated,
        bad_step=replicated,
    )


def _has_experts(moment: Any, bank: Any) -> bool:
    return all(m.shape == b.shape for m, b in zip(jax.tree.leaves(moment), jax.tree.leaves(bank)))
