"""Loss and gradients of a soup, in factored form.

The merged gradients G_m of M mixtures and the coefficients alpha_me determine the gradient of the
loss, and they are all that is kept of it. By the chain rule (section 3 of the paper)

    dS = sum_m G_m        dE_e = sum_m alpha_me G_m        dalpha_me = <G_m, E_e>

so no array of the bank's size ever holds a gradient. Kinds of experts that are small may have
explicit gradients (see `bank`).
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.soup import bank, kernels, layout, merge
from soup_jax.soup.parameters import SoupConfig, coefficients


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Batch:
    """What one step trains on: arrays of jax or NumPy, or what describes them.

    Attributes:
      rows: what the network takes, arrays [B, ...] by name, ordered by mixture: B / M rows each.
      h_MK: domain weights of the mixtures, float32.
      domain_B: domain of each row, int32, for metrics; None if not known.
    """

    rows: Mapping[str, Any]
    h_MK: Any
    domain_B: Any = None


class SoupGrads(NamedTuple):
    """Gradients in factored form; float32.

    Attributes:
      shared: dS, like S.
      router: like the router's parameters.
      merged: G_m, leaves [M, ...], for every leaf of S, on storage slices.
      alpha_ME: the coefficients that the bank's gradient needs.
      explicit: of kinds of experts whose gradients are not factored, like their parts of the bank.
    """

    shared: Params
    router: Params
    merged: Params
    alpha_ME: Array
    explicit: Params


def value_and_grad(
    params: Params,
    batch: Batch,
    *,
    model: BaseModel,
    config: SoupConfig,
    mesh: Mesh | None = None,
    num_micro: int = 1,
    gather: str = "step",
) -> tuple[tuple[Array, Any], SoupGrads]:
    """Loss and factored gradients of one batch of M mixtures.

    Args:
      num_micro: micro-batches; the merge and the bank's part are done once for all of them.
      gather: when merged models become whole inside a group of devices: "step", or "layer", by the
        network itself, layer by layer, forward and backward.

    Returns:
      ((loss, row_stats), grads): the weighted mean loss of the batch, and per row the weighted loss
      and weight sums, [B] each.

    Raises:
      UserError: gather = "layer" with a network that cannot.
    """
    alpha_ME, route_vjp = jax.vjp(
        lambda r: coefficients({"router": r}, batch.h_MK, config), params["router"]
    )
    alpha_ME = layout.everywhere(mesh, alpha_ME)
    layers = ""
    if gather == "layer":
        if model.with_gather is None:
            raise UserError("mesh.gather = 'layer': this network cannot gather its own layers")
        layers, model = model.layers, model.with_gather(layout.gather_layer(mesh))
    theta_M = merge.merge_many(
        params["shared"],
        params["bank"],
        alpha_ME,
        dtype=config.compute_dtype,
        mesh=mesh,
        layers=layers,
    )

    def to_storage(path: str, g: Array) -> Array:
        gather = not (layers and path.startswith(layers))
        return layout.to_slices(mesh, g, gather=gather).astype(jnp.float32)

    loss_sum, weight, row_stats, merged = _merged_gradients(
        theta_M,
        batch.rows,
        model=model,
        num_mixtures=alpha_ME.shape[0],
        num_micro=num_micro,
        mesh=mesh,
        to_storage=to_storage,
    )
    # Dividing after summing: the batch's weight is known only when all micro-batches are through.
    # dalpha is divided after its sum over devices, so that this sum need not wait for the weight's.
    inverse = jnp.where(weight > 0, 1.0 / jnp.where(weight > 0, weight, 1.0), 0.0)
    dalpha_EM, explicit = bank.gradients(merged, params["bank"], alpha_ME, mesh=mesh)
    dalpha_ME = layout.everywhere(mesh, dalpha_EM.T) * inverse
    merged = jax.tree.map(lambda g: g * inverse, merged)
    grads = SoupGrads(
        shared=jax.tree.map(kernels.over_mixtures, merged),
        router=route_vjp(dalpha_ME)[0],
        merged=merged,
        alpha_ME=alpha_ME,
        explicit=jax.tree.map(lambda g: g * inverse, explicit),
    )
    return (loss_sum * inverse, row_stats), grads


@jax.named_scope("forward_backward")
def _merged_gradients(
    theta_M: Params,
    rows: Mapping[str, Array],
    *,
    model: BaseModel,
    num_mixtures: int,
    num_micro: int,
    mesh: Mesh | None,
    to_storage: Callable[[str, Array], Array],
) -> tuple[Array, Array, tuple[Array, Array], Params]:
    def mixture_loss(theta: Params, mixture: Mapping[str, Array]) -> tuple[Array, Any]:
        losses, weights = model.example_losses(theta, mixture)
        axes = tuple(range(1, losses.ndim))
        row_loss, row_weight = (losses * weights).sum(axes), weights.sum(axes)
        return row_loss.sum(), (row_loss, row_weight)

    def micro_loss(theta_M: Params, micro: Mapping[str, Array]) -> tuple[Array, Any]:
        if num_mixtures == 1:  # no batched matmuls where plain ones do
            squeeze = jax.tree.map(lambda x: x[0], (theta_M, micro))
            loss, stats = mixture_loss(*squeeze)
            return loss, jax.tree.map(lambda x: x[None], stats)
        axis = "replica" if mesh is not None and mesh.size > 1 else None
        loss_M, stats = jax.vmap(mixture_loss, spmd_axis_name=axis)(theta_M, micro)
        return loss_M.sum(), stats

    # [B, ...] -> [micro, M, rows, ...], each micro-batch with rows of every mixture.
    def split(x: Array) -> Array:
        x = x.reshape(num_mixtures, num_micro, -1, *x.shape[1:]).swapaxes(0, 1)
        return layout.rows_of_groups(mesh, x)

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


def squared_norms(grads: SoupGrads, bank_params: Params) -> dict[str, Array]:
    """Squared gradient norms of "shared", "router" and "bank".

    That of experts with factored gradients has a closed form, ||dE||^2 = sum_{m,m'}
    (alpha_m . alpha_m') <G_m, G_m'> over their leaves.
    """

    def total(t: Params) -> Array:
        return sum((jnp.sum(jnp.square(x)) for x in jax.tree.leaves(t)), jnp.zeros(()))

    alpha_gram_MM = jnp.dot(grads.alpha_ME, grads.alpha_ME.T, precision="highest")
    gradient_M = tree.flatten(grads.merged)
    paths = [
        path
        for name, part in bank_params.items()
        if bank.kind_of(name).factored
        for path in bank.by_leaf(part, grads.merged)
    ]
    factored = sum(
        (kernels.weighted_norm(alpha_gram_MM, gradient_M[path]) for path in paths), jnp.zeros(())
    )
    return {
        "shared": total(grads.shared),
        "router": total(grads.router),
        # Where mixtures cancel, rounding may leave less than nothing.
        "bank": jnp.maximum(factored, 0.0) + total(grads.explicit),
    }
