"""The merge: Theta(h) = S + sum_e alpha_e E_e, for M coefficient vectors at once.

One einsum per leaf, "ME,E...->M...". Experts are never split over devices along E, so the sum over
experts is local to each device's slice; the merged leaf, cast to the compute dtype, is then
resharded from slices to mixture groups (see `sharding`). `low_rank` has the product for factors.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from soup_jax import tree
from soup_jax.shapes import Array, Params
from soup_jax.soup import layout as sharding
from soup_jax.soup import low_rank
from soup_jax.soup.pending import Pending


def merge_many(
    shared: Params,
    bank: Params,
    alpha_ME: Array,
    *,
    dtype: str | None = None,
    mesh: Mesh | None = None,
    layers: str = "",
    pending: Pending | None = None,
) -> Params:
    """M merged models, stacked: leaves [M, ...] like `shared`'s.

    Args:
      shared: S.
      bank: E_e, leaves [E, ...] or pairs of factors; of a subset of S's leaves.
      alpha_ME: coefficients, M rows; with an empty bank only M is read.
      dtype: of the result, rounded once, after a float32 sum; None keeps each shared leaf's.
      mesh: lays slices and groups out on it; None leaves that to the compiler.
      layers: leaves whose path starts so stay sliced over `fsdp`: the network gathers them itself.
      pending: what the bank lacks, if anything; it is not written to it here.
    """
    experts = tree.flatten(bank)
    directions = tree.flatten(pending.directions) if pending else {}
    num_mixtures = alpha_ME.shape[0]

    def leaf(path: str, shared_leaf: Array) -> Array:
        merged = jnp.broadcast_to(shared_leaf, (num_mixtures, *shared_leaf.shape))
        if path in experts:
            scale_E = pending.scale_E if path in directions else 1.0
            merged = merged + combine(alpha_ME * scale_E, experts[path])
        if f"{path}/left" in experts:
            left, right = experts[f"{path}/left"], experts[f"{path}/right"]
            merged = merged + low_rank.combine(alpha_ME, left, right, mesh=mesh)
        if path in directions:
            # Of the experts' updates only their sum, weighted by alpha, is needed: M x S numbers.
            weight_MS = jnp.dot(alpha_ME, pending.weight_SE.T, precision="highest")
            merged = merged - combine(weight_MS, directions[path])
        merged = merged.astype(dtype or shared_leaf.dtype)
        gather = not (layers and path.startswith(layers))
        return sharding.to_groups(mesh, merged, gather=gather)

    return tree.map_named(leaf, shared)


def combine(alpha_ME: Array, leaf_E: Array) -> Array:
    """sum_e alpha_me leaf_e, float32 [M, ...]; a bfloat16 bank is not rounded any further."""

    def product(alpha_ME: Array, leaf_E: Array) -> Array:
        # Accelerators multiply float32 in fewer bits unless told otherwise.
        return jnp.einsum(
            "ME,E...->M...",
            alpha_ME,
            leaf_E,
            precision="highest",
            preferred_element_type=jnp.float32,
        )

    return _in_parts(product, alpha_ME, leaf_E, axis=0)


def inner(leaf_M: Array, leaf_E: Array, *, whole: bool = False) -> Array:
    """<leaf_e, leaf_m> over all but the leading dimension, float32 [E, M].

    In this order, to be transposed only after summing over leaves: XLA turns a transposed product
    around, and a CPU then takes many times as long.

    Args:
      whole: that the leaves are not sliced over devices.
    """
    axes = tuple(range(1, leaf_E.ndim))

    def flat(leaf_M: Array, leaf_E: Array) -> Array:
        # Without this reshape a CPU would transpose a copy of leaf_M.
        rows_M, rows_E = (x.reshape(x.shape[0], -1) for x in (leaf_M, leaf_E))
        return jnp.dot(rows_E, rows_M.T, precision="highest", preferred_element_type=jnp.float32)

    def product(leaf_M: Array, leaf_E: Array) -> Array:
        # The bank comes first: as the second operand XLA would transpose a copy of it. No reshape,
        # which would undo the slicing.
        return jnp.tensordot(
            leaf_E,
            leaf_M,
            axes=(axes, axes),
            precision="highest",
            preferred_element_type=jnp.float32,
        )

    def by_platform(leaf_M: Array, leaf_E: Array) -> Array:
        if not whole:
            return product(leaf_M, leaf_E)
        return jax.lax.platform_dependent(leaf_M, leaf_E, cpu=flat, default=product)

    return _in_parts(by_platform, leaf_M, leaf_E, axis=1)


def _in_parts(
    product: Callable[[Array, Array], Array], x_M: Array, leaf_E: Array, *, axis: int
) -> Array:
    # A float32 operand beside a bfloat16 bank would make XLA convert a copy of the bank. So it is
    # given as two bfloat16 numbers instead, high and low part: 16 bits of mantissa. `axis` is where
    # M is in the product.
    if leaf_E.dtype != jnp.bfloat16:
        return product(x_M, leaf_E)

    def split(x_M: Array, leaf_E: Array) -> Array:
        high = jax.lax.reduce_precision(x_M, exponent_bits=8, mantissa_bits=7)
        parts = jnp.concatenate([high, x_M - high]).astype(jnp.bfloat16)
        return sum(jnp.split(product(parts, leaf_E), 2, axis))

    def converted(x_M: Array, leaf_E: Array) -> Array:
        return product(x_M, leaf_E.astype(jnp.float32))  # CPUs lack some products of bfloat16

    return jax.lax.platform_dependent(x_M, leaf_E, cpu=converted, default=split)


def over_mixtures(leaf_M: Array) -> Array:
    """sum_m leaf_m."""

    def added(leaf_M: Array) -> Array:
        # XLA's sum over a leading dimension takes a CPU many times as long.
        return sum(leaf_M[m] for m in range(leaf_M.shape[0]))

    return jax.lax.platform_dependent(leaf_M, cpu=added, default=lambda x: x.sum(0))


def merge(shared: Params, bank: Params, alpha_E: Array, *, dtype: str | None = None) -> Params:
    """One merged model, nested and shaped like `shared`."""
    merged = merge_many(shared, bank, alpha_E[None], dtype=dtype)
    return jax.tree.map(lambda leaf: leaf[0], merged)
