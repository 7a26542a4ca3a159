"""How arrays lie on the mesh: state is *stored* sliced, merged models are *computed* in groups.

Storage: every leaf is cut along one of its own dimensions over all devices, never along the expert
axis, so that the merge of all experts is local to a slice. Compute: the merged models of M mixtures
are spread over `replica`, whole inside a group. Going from one to the other takes a chain of
sharding constraints: slices of all M; mixtures over `replica`, slices over `fsdp` (an all-to-all
among replicas); whole models (an all-gather inside a group). With only the last one, XLA gathers
the bank instead. Slices are numbered fsdp-major, which is what makes the first hop stay inside the
`replica` axis.
"""

import math
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from soup_jax import tree as tree_lib
from soup_jax.mesh import AXES

# A leaf that no dimension lets us slice is replicated; above this size that deserves a warning.
LARGE_REPLICATED_BYTES = 1 << 20

_SLICED = ("fsdp", "replica")


def sliced_dim(shape: tuple[int, ...], count: int) -> int | None:
    """The dimension to cut into `count` slices: the largest that divides, the last of ties."""
    dims = [d for d, size in enumerate(shape) if size % count == 0 and size >= count]
    return max(dims, key=lambda d: (shape[d], d), default=None)


def slice_spec(shape: tuple[int, ...], count: int, *, leading: int = 0) -> P:
    """Spec that slices one dimension after the `leading` ones (E or M) over all devices."""
    dim = sliced_dim(shape[leading:], count)
    if dim is None or count == 1:
        return P()
    return P(*([None] * (leading + dim)), _SLICED)


def storage(mesh: Mesh, tree: Any, *, leading: int = 0) -> Any:
    """NamedShardings of a tree of stored leaves (shared parameters, bank, moments)."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, slice_spec(leaf.shape, mesh.size, leading=leading)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows, ordered by mixture, over the whole mesh: groups first, then devices of a group."""
    return NamedSharding(mesh, P(AXES))


def unsliced(mesh: Mesh, tree: Any, *, leading: int = 0) -> list[str]:
    """Paths and sizes of leaves that stay whole on every device, for the start-up report."""
    lines = []
    for path, leaf in tree_lib.flatten(tree).items():
        if mesh.size > 1 and sliced_dim(leaf.shape[leading:], mesh.size) is None:
            size = math.prod(leaf.shape) * leaf.dtype.itemsize
            if size >= LARGE_REPLICATED_BYTES:
                lines.append(f"{path} {tuple(leaf.shape)}, {size / 1e6:.1f} MB")
    return lines


def everywhere(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Constrain a small array to be the same on every device.

    Without it the compiler splits what depends on the number of experts (alpha, its gradient) along
    the experts and gathers it again for every leaf.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def to_slices(mesh: Mesh | None, leaf_M: jax.Array) -> jax.Array:
    """Compute layout to storage slices, for gradients of merged leaves [M, ...]."""
    for spec in reversed(_layout_chain(mesh, leaf_M.shape)):
        leaf_M = jax.lax.with_sharding_constraint(leaf_M, NamedSharding(mesh, spec))
    return leaf_M


def to_groups(mesh: Mesh | None, leaf_M: jax.Array) -> jax.Array:
    """Storage slices of merged leaves [M, ...] to the compute layout, mixtures over `replica`."""
    for spec in _layout_chain(mesh, leaf_M.shape):
        leaf_M = jax.lax.with_sharding_constraint(leaf_M, NamedSharding(mesh, spec))
    return leaf_M


def _layout_chain(mesh: Mesh | None, shape: tuple[int, ...]) -> list[P]:
    if mesh is None or mesh.size == 1:
        return []
    replica = "replica" if shape[0] % mesh.shape["replica"] == 0 else None
    dim = sliced_dim(shape[1:], mesh.size)
    if dim is None:
        return [P(), P(replica)]
    gap = [None] * dim
    return [P(None, *gap, _SLICED), P(replica, *gap, "fsdp"), P(replica)]


def rows_of_groups(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Constrain [micro, M, rows, ...]: mixtures over `replica`, a mixture's rows over `fsdp`."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "replica", "fsdp")))
