"""The merge: Theta(h) = S + sum_e alpha_e E_e, for M coefficient vectors at once.

Experts are never split over devices along E, so the sum over experts is local to each device's
slice; the merged leaf, cast to the compute dtype, is then resharded from slices to device groups
(see `layout`).
"""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from soup_jax import tree
from soup_jax.shapes import Array, Params
from soup_jax.soup import bank as bank_lib
from soup_jax.soup import layout


@jax.named_scope("merge")
def merge_many(
    shared: Params,
    bank: Params,
    alpha_ME: Array,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    layers: str = "",
) -> Params:
    """M merged models, stacked: leaves [M, ...] like `shared`'s.

    Args:
      shared: S.
      bank: E_e, by kind; of a subset of S's leaves.
      alpha_ME: coefficients, M rows; with an empty bank only M is read.
      dtype: of the result, rounded once, after a float32 sum; None keeps each shared leaf's.
      mesh: lays slices and groups out on it; None leaves that to the compiler.
      layers: leaves whose path starts so stay sliced over `fsdp`: the network gathers them itself.
    """
    experts = bank_lib.combine(shared, bank, alpha_ME, mesh=mesh)
    num_mixtures = alpha_ME.shape[0]

    def leaf(path: str, shared_leaf: Array) -> Array:
        merged = jnp.broadcast_to(shared_leaf, (num_mixtures, *shared_leaf.shape))
        if path in experts:
            merged = merged + experts[path]
        merged = merged.astype(dtype or shared_leaf.dtype)
        gather = not (layers and path.startswith(layers))
        return layout.to_groups(mesh, merged, gather=gather)

    return tree.map_named(leaf, shared)


def merge(shared: Params, bank: Params, alpha_E: Array, *, dtype: str | None = None) -> Params:
    """One merged model, nested and shaped like `shared`."""
    merged = merge_many(shared, bank, alpha_E[None], dtype=dtype)
    return jax.tree.map(lambda leaf: leaf[0], merged)
