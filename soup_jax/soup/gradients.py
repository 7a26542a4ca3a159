"""A soup as one pytree, and its gradients in factored form.

    params = {"shared": S, "bank": {leaf: [E, ...]}, "router": {...}}

The gradient of the loss of M mixtures is kept as what determines it: the merged gradients G_m
and the coefficients alpha_me. From them (section 3 of the paper, by the chain rule)

    dS = sum_m G_m        dE_e = sum_m alpha_me G_m        dalpha_me = <G_m, E_e>

so no array of the bank's size ever holds a gradient. Those of low-rank factors are as small as the
factors, and explicit.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params, check_shapes
from soup_jax.soup import bank as experts
from soup_jax.soup import layout as sharding
from soup_jax.soup import low_rank, merge, router
from soup_jax.soup.pending import Pending


@dataclasses.dataclass(frozen=True)
class SoupConfig:
    """Static settings of a soup; `soup_config` reads them from a run's config."""

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


def soup_config(cfg: ConfigDict) -> SoupConfig:
    """The soup of a config."""
    return SoupConfig(
        num_domains=cfg.num_domains,
        num_experts=cfg.num_experts,
        rules=cfg.experts.rules,
        init_scale=cfg.experts.init_scale,
        bank_dtype=cfg.experts.dtype,
        compute_dtype=cfg.model.dtype,
        router_hidden_dim=cfg.router.hidden_dim,
        router_init=cfg.router.init,
        router_center=cfg.router.center,
        router_normalization=cfg.router.normalization,
        router_scale=cfg.router.scale,
    )


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
        params["bank"] = experts.init_bank(
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


class SoupGrads(NamedTuple):
    """Gradients in factored form; float32.

    Attributes:
      shared: dS, like S.
      router: like the router's parameters.
      merged: G_m, leaves [M, ...], for every leaf of S, on storage slices.
      alpha_ME: the coefficients that the bank's gradient needs.
      factors: of low-rank experts, like their part of the bank; empty if there are none.
    """

    shared: Params
    router: Params
    merged: Params
    alpha_ME: Array
    factors: Params


def value_and_grad(
    params: Params,
    batch: Mapping[str, Array],
    *,
    model: BaseModel,
    config: SoupConfig,
    mesh: Mesh | None = None,
    num_micro: int = 1,
    gather: str = "step",
    pending: Pending | None = None,
) -> tuple[tuple[Array, Any], SoupGrads, Array]:
    """Loss, factored gradients and alpha of one batch of M mixtures.

    Args:
      batch: leaves [B, ...] ordered by mixture, and "h" [M, K].
      num_micro: micro-batches; the merge and the bank's part are done once for all of them.
      gather: when merged models become whole inside a group of devices: "step", or "layer", by the
        network itself, layer by layer, forward and backward.
      pending: updates that the bank of `params` still lacks.

    Returns:
      ((loss, row_stats), grads, alpha_ME): the weighted mean loss of the batch, and per row the
      weighted loss and weight sums, [B] each.
    """
    h_MK = batch["h"]
    alpha_ME, route_vjp = jax.vjp(
        lambda r: coefficients({"router": r}, h_MK, config), params["router"]
    )
    alpha_ME = sharding.everywhere(mesh, alpha_ME)
    groups = alpha_ME.shape[0]
    layers = ""
    if gather == "layer":
        if model.with_gather is None:
            raise UserError("mesh.gather = 'layer': this network cannot gather its own layers")
        layers, model = model.layers, model.with_gather(sharding.gather_layer(mesh))
    theta_M = merge.merge_many(
        params["shared"],
        params["bank"],
        alpha_ME,
        dtype=config.compute_dtype,
        mesh=mesh,
        layers=layers,
        pending=pending,
    )
    rows = {name: value for name, value in batch.items() if name != "h"}

    def to_storage(path: str, g: Array) -> Array:
        gather = not (layers and path.startswith(layers))
        return sharding.to_slices(mesh, g, gather=gather).astype(jnp.float32)

    loss_sum, weight, row_stats, merged = _merged_gradients(
        theta_M,
        rows,
        model=model,
        groups=groups,
        num_micro=num_micro,
        mesh=mesh,
        to_storage=to_storage,
    )
    # Dividing after summing: the batch's weight is known only when all micro-batches are through.
    # dalpha is divided after its sum over devices, so that this sum need not wait for the weight's.
    inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
    dalpha_ME = coefficient_gradient(merged, params["bank"], alpha_ME, mesh=mesh, pending=pending)
    factors, dalpha_low_ME = factor_gradients(merged, params["bank"], alpha_ME, mesh=mesh)
    dalpha_ME = (sharding.everywhere(mesh, dalpha_ME) + dalpha_low_ME) * inverse
    merged = jax.tree.map(lambda g: g * inverse, merged)
    grads = SoupGrads(
        shared=jax.tree.map(merge.over_mixtures, merged),
        router=route_vjp(dalpha_ME)[0],
        merged=merged,
        alpha_ME=alpha_ME,
        factors=jax.tree.map(lambda g: g * inverse, factors),
    )
    return (loss_sum * inverse, row_stats), grads, alpha_ME


def coefficient_gradient(
    merged: Params,
    bank: Params,
    alpha_ME: Array,
    *,
    mesh: Mesh | None = None,
    pending: Pending | None = None,
) -> Array:
    """dalpha_me = sum over dense leaves of <G_m, E_e>, float32 [M, E]; experts with what is
    pending."""
    gradients = tree.flatten(merged)
    whole = mesh is None or mesh.size == 1
    directions = tree.flatten(pending.directions) if pending else {}
    total_EM = jnp.zeros_like(alpha_ME.T)
    for path, leaf in tree.flatten(low_rank.split(bank, merged)[0]).items():
        products_EM = merge.inner(gradients[path], leaf, whole=whole)
        if path in directions:
            products_SM = merge.inner(gradients[path], directions[path], whole=whole)
            products_EM = products_EM * pending.scale_E[:, None]
            products_EM -= jnp.dot(pending.weight_SE.T, products_SM, precision="highest")
        total_EM = total_EM + products_EM
    return total_EM.T


def factor_gradients(
    merged: Params, bank: Params, alpha_ME: Array, *, mesh: Mesh | None = None
) -> tuple[Params, Array]:
    """(gradients of low-rank factors, nested like them; their part of dalpha_me, [M, E])."""
    factors = tree.flatten(low_rank.split(bank, merged)[1])
    gradients, total = {}, jnp.zeros_like(alpha_ME)
    for path, gradient_M in tree.flatten(merged).items():
        pair = [f"{path}/left", f"{path}/right"]
        if pair[0] in factors:
            dalpha_ME, *dfactors = low_rank.gradient(
                alpha_ME, *(factors[name] for name in pair), gradient_M, mesh=mesh
            )
            gradients |= dict(zip(pair, dfactors))
            total = total + dalpha_ME
    return tree.unflatten(gradients), total


def _merged_gradients(
    theta_M: Params,
    rows: Mapping[str, Array],
    *,
    model: BaseModel,
    groups: int,
    num_micro: int,
    mesh: Mesh | None,
    to_storage: Callable[[str, Array], Array],
) -> tuple[Array, Array, tuple[Array, Array], Params]:
    def group_loss(theta: Params, group: Mapping[str, Array]) -> tuple[Array, Any]:
        losses, weights = model.example_losses(theta, group)
        axes = tuple(range(1, losses.ndim))
        row_loss, row_weight = (losses * weights).sum(axes), weights.sum(axes)
        return row_loss.sum(), (row_loss, row_weight)

    def micro_loss(theta_M: Params, micro: Mapping[str, Array]) -> tuple[Array, Any]:
        if groups == 1:  # no batched matmuls where plain ones do
            squeeze = jax.tree.map(lambda x: x[0], (theta_M, micro))
            loss, stats = group_loss(*squeeze)
            return loss, jax.tree.map(lambda x: x[None], stats)
        spmd = {"spmd_axis_name": "replica"} if mesh is not None and mesh.size > 1 else {}
        loss_M, stats = jax.vmap(group_loss, **spmd)(theta_M, micro)
        return loss_M.sum(), stats

    # [B, ...] -> [micro, M, rows, ...], each micro-batch with rows of every mixture.
    def split(x: Array) -> Array:
        x = x.reshape(groups, num_micro, -1, *x.shape[1:]).swapaxes(0, 1)
        return sharding.rows_of_groups(mesh, x)

    micros = jax.tree.map(split, dict(rows))
    gradient = jax.value_and_grad(micro_loss, has_aux=True)
    if num_micro == 1:
        (loss_sum, stats), merged = gradient(theta_M, jax.tree.map(lambda x: x[0], micros))
        merged = tree.map_named(to_storage, merged)
        stats = jax.tree.map(lambda x: x[None], stats)
    else:

        def add(carry: Any, micro: Any) -> tuple[Any, Any]:
            (loss, stats), g = gradient(theta_M, micro)
            # Accumulated on slices: whole sums would be M models in float32 on every device.
            g = tree.map_named(to_storage, g)
            carry = (carry[0] + loss, jax.tree.map(lambda a, b: a + b, carry[1], g))
            return carry, stats

        zeros = tree.map_named(
            lambda path, t: to_storage(path, jnp.zeros(t.shape, jnp.float32)), theta_M
        )
        (loss_sum, merged), stats = jax.lax.scan(add, (jnp.zeros(()), zeros), micros)
    row_stats = jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1), stats)
    return loss_sum, row_stats[1].sum(), row_stats, merged


def squared_norms(grads: SoupGrads, bank_paths: Sequence[str]) -> dict[str, Array]:
    """Squared gradient norms of "shared", "router" and "bank", of dense experts in closed form.

    ||dE||^2 = sum_{m,m'} (alpha_m . alpha_m') <G_m, G_m'> over the leaves that have dense experts:
    `bank_paths`.
    """

    def total(t: Params) -> Array:
        return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(t)), jnp.zeros(()))

    alpha_gram_MM = jnp.dot(grads.alpha_ME, grads.alpha_ME.T, precision="highest")
    gradients = tree.flatten(grads.merged)
    dense = sum(
        (_weighted_norm(alpha_gram_MM, gradients[path]) for path in bank_paths), jnp.zeros(())
    )
    return {
        "shared": total(grads.shared),
        "router": total(grads.router),
        # Where mixtures cancel, rounding may leave less than nothing.
        "bank": jnp.maximum(dense, 0.0) + total(grads.factors),
    }


def _weighted_norm(weight_MM: Array, leaf_M: Array) -> Array:
    # sum_{m,m'} weight_mm' <leaf_m, leaf_m'>
    def by_gram(weight_MM: Array, leaf_M: Array) -> Array:
        return jnp.sum(weight_MM * merge.inner(leaf_M, leaf_M))

    def by_product(weight_MM: Array, leaf_M: Array) -> Array:
        # A CPU takes twice as long for so few sums over so many numbers, half of it for a
        # transposed copy.
        return jnp.sum(leaf_M * merge.combine(weight_MM, leaf_M))

    return jax.lax.platform_dependent(weight_MM, leaf_M, cpu=by_product, default=by_gram)
