"""How arrays lie on the mesh: state is *stored* sliced, merged models are *computed* in groups.

Storage: every leaf is cut along one of its own dimensions over all devices, never along the expert
axis, so that the merge of all experts is local to a slice. Compute: the merged models of M mixtures
are spread over `replica`, whole inside a group. Going from one to the other is two sharding
constraints in a row (slices of all M, then groups); with one, XLA gathers the bank instead.
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


def sliced_dim(shape: tuple[int, ...], count: int) -> int | None:
    """The dimension to cut into `count` equal slices: the largest that divides, the last of ties."""
    dims = [d for d, size in enumerate(shape) if size % count == 0 and size >= count]
    return max(dims, key=lambda d: (shape[d], d), default=None)


def slice_spec(shape: tuple[int, ...], count: int, *, leading: int = 0) -> P:
    """Spec that slices one dimension after the `leading` (expert or mixture) ones over all devices."""
    dim = sliced_dim(shape[leading:], count)
    if dim is None or count == 1:
        return P()
    return P(*([None] * (leading + dim)), AXES)


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


def to_slices(mesh: Mesh | None, leaf_M: jax.Array) -> jax.Array:
    """Constrain a merged leaf [M, ...] to storage slices (mixtures whole on each device)."""
    if mesh is None or mesh.size == 1:
        return leaf_M
    spec = slice_spec(leaf_M.shape, mesh.size, leading=1)
    return jax.lax.with_sharding_constraint(leaf_M, NamedSharding(mesh, spec))


def to_groups(mesh: Mesh | None, leaf_M: jax.Array) -> jax.Array:
    """Constrain a merged leaf [M, ...] to the compute layout: mixtures over `replica`."""
    if mesh is None or mesh.size == 1:
        return leaf_M
    return jax.lax.with_sharding_constraint(leaf_M, NamedSharding(mesh, P("replica")))
