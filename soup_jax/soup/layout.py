"""How arrays lie on the mesh: state is *stored* sliced, merged models are *computed* in groups.

Storage: every leaf is cut along its own dimensions over all devices, never along the expert axis,
so that the merge of all experts is local to a slice. Compute: the merged models of M mixtures are
spread over `replica`, whole inside a group. Going from one to the other takes a chain of sharding
constraints: slices of all M; mixtures over `replica`, slices over `fsdp` (an all-to-all among
replicas); whole models (an all-gather inside a group). With only the last one, XLA gathers the bank
instead. Slices are numbered fsdp-major, so that the first hop stays inside the `replica` axis. With
`mesh.gather` = "layer" the network takes the last hop itself, one layer at a time (`gather_layer`),
and no device ever holds a whole merged model.

The rule for a leaf, first one that fits: its largest dimension that divides by the number of
devices is cut by both axes; two dimensions are cut by one axis each; one dimension is cut by one
axis, the longer first, and the other axis holds copies; the leaf is whole everywhere. `unsliced`
reports large leaves that end in the last two cases.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from soup_jax import tree as tree_lib
from soup_jax.hardware.mesh import AXES

# Small leaves may be whole on every device; above this size that deserves a warning.
LARGE_REPLICATED_BYTES = 1 << 20

_SLICED = ("fsdp", "replica")


def slice_dims(shape: Sequence[int], mesh: Mesh) -> dict[int, tuple[str, ...]]:
    """Mesh axes by the dimension that they cut, by the rule above; {} for a leaf kept whole.

    Of equally large dimensions the first is cut: a TPU pads the last one to 128 numbers.
    """
    sizes = {axis: mesh.shape[axis] for axis in _SLICED if mesh.shape[axis] > 1}

    def cut(count: int, *, without: int | None = None) -> int | None:
        dims = [d for d, n in enumerate(shape) if n and n % count == 0 and d != without]
        return max(dims, key=lambda d: (shape[d], -d), default=None)

    if not sizes:
        return {}
    dim = cut(math.prod(sizes.values()))
    if dim is not None:
        return {dim: tuple(sizes)}
    found: dict[int, tuple[str, ...]] = {}
    for axis in sorted(sizes, key=lambda a: -sizes[a]):
        dim = cut(sizes[axis], without=next(iter(found), None))
        if dim is not None:
            found[dim] = (axis,)
    return found


def _spec(dims: Mapping[int, tuple[str, ...]], *leading: Any) -> P:
    # A dimension's axes: a name alone, or a tuple of several.
    last = max(dims, default=-1)
    named = [dims.get(d, ()) for d in range(last + 1)]
    spec = [*leading, *(axes[0] if len(axes) == 1 else axes or None for axes in named)]
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def slice_spec(shape: Sequence[int], mesh: Mesh, *, leading: int = 0) -> P:
    """Spec of a stored leaf; its `leading` dimensions (E or M) are never cut."""
    return _spec(slice_dims(shape[leading:], mesh), *[None] * leading)


def storage(mesh: Mesh, tree: Any, *, leading: int = 0) -> Any:
    """NamedShardings of a tree of stored leaves (shared parameters, bank, moments)."""
    return jax.tree.map(
        lambda leaf: NamedSharding(mesh, slice_spec(leaf.shape, mesh, leading=leading)), tree
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The same value on every device."""
    return NamedSharding(mesh, P())


def batch(mesh: Mesh) -> NamedSharding:
    """Rows, ordered by mixture, over the whole mesh: groups first, then devices of a group."""
    return NamedSharding(mesh, P(AXES))


def unsliced(mesh: Mesh, tree: Any, *, leading: int = 0) -> list[str]:
    """Large leaves that devices hold copies of, with size and number of copies, for a report."""
    lines = []
    for path, leaf in tree_lib.flatten(tree).items():
        dims = slice_dims(leaf.shape[leading:], mesh)
        cuts = math.prod(mesh.shape[axis] for axes in dims.values() for axis in axes)
        size = math.prod(leaf.shape) * leaf.dtype.itemsize // cuts
        if cuts < mesh.size and size >= LARGE_REPLICATED_BYTES:
            lines.append(
                f"{path} {tuple(leaf.shape)}: {size / 1e6:.1f} MB on every device, "
                f"{mesh.size // cuts} copies"
            )
    return lines


def everywhere(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Constrain a small array to be the same on every device.

    Without it the compiler splits what depends on the number of experts (alpha, its gradient) along
    the experts and gathers it again for every leaf.
    """
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))


def to_groups(mesh: Mesh | None, leaf_M: jax.Array, *, gather: bool = True) -> jax.Array:
    """Storage slices of merged leaves [M, ...] to the compute layout, mixtures over `replica`.

    Args:
      gather: False leaves out the last hop: slices over `fsdp`, for `gather_layer`.
    """
    for sharding in _layout_chain(mesh, leaf_M.shape)[: 3 if gather else 2]:
        leaf_M = jax.lax.with_sharding_constraint(leaf_M, sharding)
    return leaf_M


def to_slices(mesh: Mesh | None, leaf_M: jax.Array, *, gather: bool = True) -> jax.Array:
    """Compute layout to storage slices, for gradients of merged leaves [M, ...].

    Args:
      gather: as it was in `to_groups`.
    """
    for sharding in reversed(_layout_chain(mesh, leaf_M.shape)[: 3 if gather else 2]):
        leaf_M = jax.lax.with_sharding_constraint(leaf_M, sharding)
    return leaf_M


def _layout_chain(mesh: Mesh | None, shape: Sequence[int]) -> list[NamedSharding]:
    if mesh is None or mesh.size == 1:
        return []
    replica = "replica" if shape[0] % mesh.shape["replica"] == 0 else None
    dims = slice_dims(shape[1:], mesh)
    inside = {d: ("fsdp",) for d, axes in dims.items() if "fsdp" in axes}
    specs = (_spec(dims, None), _spec(inside, replica), _spec({}, replica))
    return [NamedSharding(mesh, spec) for spec in specs]


def gather_layer(mesh: Mesh | None) -> Callable[[Any], Any]:
    """Function for the parameters of one layer: slices over `fsdp` to whole leaves, and gradients
    back to slices. For use inside the network, where no M is seen (it is vmapped away)."""
    if mesh is None or mesh.shape["fsdp"] == 1:
        return lambda layer: layer

    def inside(x: jax.Array) -> NamedSharding:
        dims = slice_dims(x.shape, mesh)
        kept = {d: ("fsdp",) for d, axes in dims.items() if "fsdp" in axes}
        return NamedSharding(mesh, _spec(kept))

    @jax.custom_vjp
    def whole(x: jax.Array) -> jax.Array:
        x = jax.lax.with_sharding_constraint(x, inside(x))
        return jax.lax.with_sharding_constraint(x, replicated(mesh))

    # Without its own rule the gradient would be summed whole on every device of the group.
    whole.defvjp(
        lambda x: (whole(x), None),
        lambda _, g: (jax.lax.with_sharding_constraint(g, inside(g)),),
    )
    return lambda layer: jax.tree.map(whole, layer)


def rows_of_groups(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    """Constrain [micro, M, rows, ...]: mixtures over `replica`, a mixture's rows over `fsdp`."""
    if mesh is None or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(None, "replica", "fsdp")))
