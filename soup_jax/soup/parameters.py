"""A soup as one pytree of parameters, and the settings that say what it is.

params = {"shared": S, "bank": {kind: {leaf: [E, ...]}}, "router": {...}}
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.shapes import Array, Params, check_shapes
from soup_jax.soup import bank, merge, router


@dataclasses.dataclass(frozen=True)
class SoupConfig:
    """Static settings of a soup.

    Attributes:
      num_domains: K.
      num_experts: E; 0 is one model without experts.
      rules: ordered (regex, rule) pairs over leaf paths (see `bank`).
      init_scale: std of dense experts' init, as a multiple of the shared leaf's RMS.
      bank_dtype: storage of the experts, float32 or bfloat16.
      compute_dtype: of the merged models.
      router_hidden_dim, router_init, router_center, router_normalization, router_scale: see
        `router`.
    """

    num_domains: int
    num_experts: int
    rules: tuple[tuple[str, str], ...] = ((".*", "dense"),)
    init_scale: float = 0.0
    bank_dtype: str = "float32"
    compute_dtype: str = "float32"
    router_hidden_dim: int = 64
    router_init: str = "random"
    router_center: bool = True
    router_normalization: str = "none"
    router_scale: float = 1.0


def init(
    key: Array,
    init_base: Callable[[Array], Params],
    config: SoupConfig,
    *,
    frequencies_K: np.ndarray,
    centroids_KC: np.ndarray | None = None,
) -> Params:
    """Parameters of a soup over the base network that `init_base(key)` makes.

    Traceable: under `jax.jit(..., out_shardings=...)` no unsharded bank ever exists. The shared
    parameters depend only on `key`, not on the number of experts.
    """
    base_key, bank_key, router_key = jax.random.split(key, 3)
    shared = init_base(base_key)
    params: dict[str, Any] = {"shared": shared, "bank": {}, "router": {}}
    if config.num_experts:
        params["bank"] = bank.init_bank(
            bank_key,
            shared,
            num_experts=config.num_experts,
            rules=config.rules,
            init_scale=config.init_scale,
            dtype=config.bank_dtype,
        )
        params["router"] = router.init_router(
            router_key,
            num_domains=config.num_domains,
            num_experts=config.num_experts,
            hidden_dim=config.router_hidden_dim,
            frequencies_K=frequencies_K,
            centroids_KC=centroids_KC if config.router_init == "centroids" else None,
        )
    return params


def coefficients(params: Params, h_MK: Array, config: SoupConfig) -> Array:
    """alpha_ME of M domain weights; [1, 0] without experts, where all mixtures share one model."""
    check_shapes(h_MK=h_MK)
    if not config.num_experts:
        return jnp.zeros((1, 0), jnp.float32)
    return router.route(
        params["router"],
        h_MK,
        normalization=config.router_normalization,
        scale=config.router_scale,
        center=config.router_center,
    )


def specialist(params: Params, h_K: Array, config: SoupConfig) -> tuple[Params, Array]:
    """(Theta(h), alpha_E): the parameters of one ordinary base network, in S's dtype."""
    alpha_E = coefficients(params, jnp.asarray(h_K)[None], config)[0]
    return merge.merge(params["shared"], params["bank"], alpha_E), alpha_E
