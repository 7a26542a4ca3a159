"""The parameters of a soup where they lie on disk, read by blocks of experts.

A bank need not fit into memory: `merge` takes the experts of one leaf in blocks. It holds the
merged models, one leaf of the shared parameters and one block. The blocks' sums are added in
float32, in the order of the experts, whatever the mesh that trained them.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import tree
from soup_jax.errors import DamagedError
from soup_jax.shapes import Array, Params
from soup_jax.soup.bank import by_leaf, kind_of
from soup_jax.training import integrity

# Of one read. Reading is then no slower than with larger ones, and all else is small beside it.
BLOCK_BYTES = 64 << 20


class Arrays(Protocol):
    """Named arrays on disk: "shared/...", "bank/KIND/...", "router/..."."""

    @property
    def shapes(self) -> Mapping[str, jax.ShapeDtypeStruct]:
        """What is there, by name."""
        ...

    @property
    def checksums(self) -> Mapping[str, str]:
        """`integrity.checksums` by name; empty if none were saved."""
        ...

    def rows(self, name: str) -> int:
        """The fewest rows (along the first dimension) that are one read of the file."""
        ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows [start, stop) of an array; all by default."""
        ...


def read_below(arrays: Arrays, part: str) -> Any:
    """All arrays of "shared", "bank" or "router", nested."""
    names = {name: arrays.read(name) for name in arrays.shapes if name.startswith(f"{part}/")}
    return tree.unflatten(names).get(part, {})


def blocks(arrays: Arrays, name: str) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first row, rows), of all rows of an array.

    Raises:
      DamagedError: after the last, if it is not what was saved.
    """
    running = integrity.Running()
    for start, stop in _ranges(arrays, [name]):
        block = arrays.read(name, start, stop)
        if name in arrays.checksums:
            running.add(block, start)
        yield start, block
    if arrays.checksums.get(name, running.hex()) != running.hex():
        raise DamagedError(f"{name} changed since it was saved")


def read_all(arrays: Arrays, shardings: Any, *, where: str) -> Params:
    """Everything, laid out as `shardings` say.

    Raises:
      DamagedError: an array is not what was saved.
    """

    def leaf(name: str, sharding: Any) -> Array:
        shape = arrays.shapes[name]

        def piece(index: Any) -> np.ndarray:
            if not index:
                return arrays.read(name)
            start, stop, _ = index[0].indices(shape.shape[0])
            return arrays.read(name, start, stop)[(slice(None), *index[1:])]

        return jax.make_array_from_callback(shape.shape, sharding, piece)

    params = tree.map_named(leaf, shardings)
    found = integrity.differences(
        {f"params/{name}": value for name, value in arrays.checksums.items()}, {"params": params}
    )
    if found:
        raise _damaged(where, [name.removeprefix("params/") for name in found])
    return params


def merge(arrays: Arrays, alpha_ME: np.ndarray, *, where: str) -> list[Params]:
    """The merged models of M coefficient vectors, through one read of the bank.

    Args:
      where: the arrays lie, for messages.

    Raises:
      DamagedError: an array is not what was saved.
    """
    bank = _bank(arrays)
    shared = tree.unflatten({n: n for n in arrays.shapes if n.startswith("shared/")})["shared"]
    merged: list[dict[str, np.ndarray]] = [{} for _ in alpha_ME]
    changed: list[str] = []
    for path in tree.flatten(shared):
        total_M: Any = None
        for kind, part in bank.items():
            stacks = by_leaf(part, shared).get(path)
            if stacks is not None:
                total_M = _combined(arrays, kind, stacks, alpha_ME, total_M, changed)
        leaf = _read_checked(arrays, f"shared/{path}", changed)
        for m, found in enumerate(merged):
            found[path] = leaf if total_M is None else _added(leaf, total_M[m])
    if changed:
        raise _damaged(where, changed)
    return [tree.unflatten(found) for found in merged]


def _damaged(where: str, changed: list[str]) -> DamagedError:
    some = ", ".join(changed[:5])
    return DamagedError(f"{where} is damaged: {some} changed since it was saved")


def peak_bytes(arrays: Arrays, num_models: int) -> int:
    """What `merge` holds at once, beyond what the process has: the models, and of one leaf the sums
    and a block on both sides of the device's door."""
    largest = 0
    for name, shape in arrays.shapes.items():
        if name.startswith("shared/"):
            largest = max(largest, 4 * math.prod(shape.shape) * (2 * num_models + 1))
    blocks = [
        min(_rows(arrays, name), shape.shape[0]) * _row_bytes(shape)
        for name, shape in arrays.shapes.items()
        if name.startswith("bank/")
    ]
    model = sum(
        math.prod(s.shape) * s.dtype.itemsize
        for name, s in arrays.shapes.items()
        if name.startswith("shared/")
    )
    return num_models * model + largest + 3 * max(blocks, default=0)


def _row_bytes(shape: jax.ShapeDtypeStruct) -> int:
    return math.prod(shape.shape[1:]) * shape.dtype.itemsize


def _rows(arrays: Arrays, name: str) -> int:
    # Whole reads of the file, as many as a block holds.
    rows = arrays.rows(name)
    return rows * max(BLOCK_BYTES // max(rows * _row_bytes(arrays.shapes[name]), 1), 1)


def _ranges(arrays: Arrays, names: Sequence[str]) -> Iterator[tuple[int, int]]:
    # Of rows, through arrays of equally many.
    shape = arrays.shapes[names[0]].shape
    if not shape:
        yield 0, 1
        return
    rows = max(min(_rows(arrays, name) for name in names), 1)
    for start in range(0, shape[0], rows):
        yield start, min(start + rows, shape[0])


def _bank(arrays: Arrays) -> dict[str, Params]:
    # Nested as the bank is, with names for arrays.
    names = {n: n for n in arrays.shapes if n.startswith("bank/")}
    return tree.unflatten(names).get("bank", {})


def _combined(
    arrays: Arrays, kind: str, stacks: Any, alpha_ME: np.ndarray, total_M: Any, changed: list[str]
) -> Array:
    names = jax.tree.leaves(stacks)
    sums = {name: integrity.Running() for name in names}
    for start, stop in _ranges(arrays, names):
        block = jax.tree.map(lambda name: jnp.asarray(arrays.read(name, start, stop)), stacks)  # noqa: B023
        for name, read in zip(names, jax.tree.leaves(block)):
            if name in arrays.checksums:
                sums[name].add(read, start)
        part_M = _combine(kind, jnp.asarray(alpha_ME[:, start:stop], jnp.float32), block)
        total_M = part_M if total_M is None else _sum(total_M, part_M)
    changed += [n for n in names if arrays.checksums.get(n, sums[n].hex()) != sums[n].hex()]
    return total_M


@functools.partial(jax.jit, static_argnums=0)
def _combine(kind: str, alpha_ME: Array, stacks: Any) -> Array:
    return kind_of(kind).combine(alpha_ME, stacks)


@functools.partial(jax.jit, donate_argnums=0)
def _sum(total_M: Array, part_M: Array) -> Array:
    return total_M + part_M


def _added(leaf: np.ndarray, experts: Array) -> np.ndarray:
    return np.asarray((jnp.asarray(leaf) + experts).astype(leaf.dtype))


def _read_checked(arrays: Arrays, name: str, changed: list[str]) -> np.ndarray:
    leaf = arrays.read(name)
    if name in arrays.checksums:
        running = integrity.Running()
        running.add(leaf, 0)
        if running.hex() != arrays.checksums[name]:
            changed.append(name)
    return leaf
