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

# Of one read. Larger ones were no faster.
BLOCK_BYTES = 16 << 20
_TOGETHER = 4
# What `held` keeps in memory.
HELD_BYTES = 2 << 30


class Arrays(Protocol):
    """Named arrays on disk: "shared/...", "bank/KIND/...", "router/..."."""

    @property
    def where(self) -> str:
        """The folder they lie in, for messages."""
        ...

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


def blocks(arrays: Arrays, names: Sequence[str]) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """(number of the first row, rows by name), of all rows of arrays with equally many.

    Raises:
      DamagedError: after the last, if one is not what was saved.
    """
    sums = {name: integrity.Running() for name in names if name in arrays.checksums}
    for start, stop in _ranges(arrays, names):
        found = {name: arrays.read(name, start, stop) for name in names}
        for name, running in sums.items():
            running.add(found[name], start)
        yield start, found
    _check(arrays, [n for n, running in sums.items() if running.hex() != arrays.checksums[n]])


def _check(arrays: Arrays, changed: Sequence[str]) -> None:
    if changed:
        raise DamagedError(
            f"{arrays.where} is damaged: {', '.join(changed[:5])} changed since it was saved. "
            "Restore it, or take another step"
        )


def read_below(arrays: Arrays, part: str) -> Any:
    """All arrays of "shared", "bank" or "router", nested.

    Raises:
      DamagedError: an array is not what was saved.
    """
    names = [name for name in arrays.shapes if name.startswith(f"{part}/")]
    return tree.unflatten({name: _whole(arrays, name) for name in names}).get(part, {})


def _whole(arrays: Arrays, name: str) -> np.ndarray:
    found = [block[name] for _, block in blocks(arrays, [name])]
    return np.concatenate(found) if len(found) > 1 else found[0]


def read_all(arrays: Arrays, shardings: Any) -> Params:
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
    _check(arrays, [name.removeprefix("params/") for name in found])
    return params


def merge(arrays: Arrays, alpha_ME: np.ndarray) -> list[Params]:
    """The merged models of M coefficient vectors, through one read of the bank.

    Raises:
      DamagedError: an array is not what was saved.
    """
    bank = _nested(arrays, "bank")
    shared = _nested(arrays, "shared")
    merged: list[dict[str, np.ndarray]] = [{} for _ in alpha_ME]
    for path, name in tree.flatten(shared).items():
        totals: Any = None
        for kind, part in bank.items():
            stacks = by_leaf(part, shared).get(path)
            if stacks is not None:
                totals = _combined(arrays, kind, stacks, alpha_ME, totals)
        leaf = _whole(arrays, name)
        for m, found in enumerate(merged):
            experts = None if totals is None else totals[m // _TOGETHER][m % _TOGETHER]
            found[path] = leaf if experts is None else _added(leaf, experts)
    return [tree.unflatten(found) for found in merged]


def project(arrays: Arrays, gradients: Sequence[Params]) -> np.ndarray:
    """d loss / d alpha [M, E] of M merged models with these gradients; reads the bank once.

    Raises:
      DamagedError: an array is not what was saved.
    """
    bank, shared = _nested(arrays, "bank"), _nested(arrays, "shared")
    flat = [tree.flatten(gradient) for gradient in gradients]
    total: Any = 0.0
    for kind, part in bank.items():
        for path, stacks in by_leaf(part, shared).items():
            gradient_M = np.stack([leaves[path] for leaves in flat])
            found = []
            for _, block in blocks(arrays, jax.tree.leaves(stacks)):
                nested = jax.tree.map(lambda name: jnp.asarray(block[name]), stacks)  # noqa: B023
                found.append(np.asarray(_project(kind, nested, gradient_M)))
            total = total + np.concatenate(found).astype(np.float64)
    return total.T


@functools.partial(jax.jit, static_argnums=0)
def _project(kind: str, stacks: Any, gradient_M: Array) -> Array:
    alpha_ME = jnp.zeros((len(gradient_M), len(jax.tree.leaves(stacks)[0])))
    return kind_of(kind).gradient(alpha_ME, stacks, gradient_M.astype(jnp.float32))[0]


class _Held:
    # `Arrays` in memory, which were compared with their checksums as they were read.

    def __init__(self, arrays: Arrays):
        self.where = arrays.where
        self.shapes = arrays.shapes
        self.checksums: Mapping[str, str] = {}
        self._found = {name: _whole(arrays, name) for name in arrays.shapes}

    def rows(self, name: str) -> int:
        return 1

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        array = self._found[name]
        return array[start:stop] if array.ndim else array


class Averaged:
    """The mean of several checkpoints of one run, array by array, as `Arrays`.

    A merged model is linear in shared parameters and experts, so those of the mean are the mean of
    those. The router is not linear: its parameters are averaged like the others, and the mean's
    coefficients are not the mean of coefficients.
    """

    def __init__(self, sources: Sequence[Arrays]):
        """Reads all of them once, to compare them with their checksums.

        Raises:
          DamagedError: an array is not what was saved.
        """
        for source in sources:
            for name in source.shapes:
                for _ in blocks(source, [name]):
                    pass
        self.where = " + ".join(source.where for source in sources)
        self.shapes = sources[0].shapes
        self.checksums: Mapping[str, str] = {}
        self._sources = sources

    def rows(self, name: str) -> int:
        """See `Arrays`."""
        return max(source.rows(name) for source in self._sources)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """See `Arrays`; the mean is taken in float32."""
        total = sum(source.read(name, start, stop).astype(np.float32) for source in self._sources)
        return np.asarray(total / len(self._sources)).astype(self.shapes[name].dtype)


def held(arrays: Arrays) -> Arrays:
    """The same arrays in memory, if they are small: for those who read them many times.

    Raises:
      DamagedError: an array is not what was saved.
    """
    return _Held(arrays) if are_held(arrays) else arrays


def are_held(arrays: Arrays) -> bool:
    """Whether they are small enough for that."""
    return tree.num_bytes(arrays.shapes) <= HELD_BYTES


def merge_bytes(arrays: Arrays, num_models: int) -> int:
    """About what arrays of `merge` take at most: the models, the sums of a leaf, and a block in
    three copies (as it is read, on the device, and as a product wants it). What is compiled for
    each shape of a leaf is not in it, and is more for a small network."""
    shared, bank = _nested(arrays, "shared"), _nested(arrays, "bank")
    models = num_models * tree.num_bytes([arrays.shapes[n] for n in tree.flatten(shared).values()])
    groups = -(-num_models // _TOGETHER)
    most = 0
    for part in bank.values():
        for path, stacks in by_leaf(part, shared).items():
            leaf = math.prod(arrays.shapes[f"shared/{path}"].shape) * 4
            block = sum(
                min(_rows(arrays, name), arrays.shapes[name].shape[0])
                * _row_bytes(arrays.shapes[name])
                for name in jax.tree.leaves(stacks)
            )
            most = max(most, (groups + 1) * _TOGETHER * leaf + 3 * block)
    return models + most


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


def _nested(arrays: Arrays, part: str) -> Params:
    # Nested as the part is, with names for arrays.
    names = {n: n for n in arrays.shapes if n.startswith(f"{part}/")}
    return tree.unflatten(names).get(part, {})


def _combined(arrays: Arrays, kind: str, stacks: Any, alpha_ME: np.ndarray, totals: Any) -> Any:
    # Groups of always as many models: the order of a sum depends on their number, and the bits of
    # a specialist must not depend on which others are made with it.
    num_groups = -(-len(alpha_ME) // _TOGETHER)
    padded = np.zeros((num_groups * _TOGETHER, alpha_ME.shape[1]), np.float32)
    padded[: len(alpha_ME)] = alpha_ME
    for start, found in blocks(arrays, jax.tree.leaves(stacks)):
        block = jax.tree.map(lambda name: jnp.asarray(found[name]), stacks)  # noqa: B023
        rows = slice(start, start + len(jax.tree.leaves(block)[0]))
        parts = np.split(padded[:, rows], num_groups)
        if totals is None:
            totals = [_combine(kind, alpha, block) for alpha in parts]
        else:
            totals = [_add(kind, t, alpha, block) for t, alpha in zip(totals, parts)]
    return totals


@functools.partial(jax.jit, static_argnums=0)
def _combine(kind: str, alpha_ME: Array, stacks: Any) -> Array:
    return kind_of(kind).combine(alpha_ME, stacks)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def _add(kind: str, total_M: Array, alpha_ME: Array, stacks: Any) -> Array:
    return total_M + kind_of(kind).combine(alpha_ME, stacks)


def _added(leaf: np.ndarray, experts: Array) -> np.ndarray:
    return np.asarray((jnp.asarray(leaf) + experts).astype(leaf.dtype))
