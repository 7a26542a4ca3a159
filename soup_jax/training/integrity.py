"""Checksums of arrays: equal for any mesh, any files and any compression, different for other bits.

Orbax and its formats check none of the bytes they read. The checksum of a leaf is two sums over its
elements, modulo 2^32, of their bits times odd numbers made from their positions: a single element
that differs always changes both. The devices compute it where the leaf lies, at the price of
reading it once.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from soup_jax import tree
from soup_jax.shapes import Array


def _checksum(leaf: Array, first: Array | int = 0) -> Array:
    # Of rows of a larger leaf, that from `first` on.
    width = leaf.dtype.itemsize
    bits = leaf.astype(jnp.uint8) if leaf.dtype == bool else leaf
    bits = jax.lax.bitcast_convert_type(bits, jnp.dtype(f"uint{8 * width}")).astype(jnp.uint32)
    position = jnp.zeros(leaf.shape, jnp.uint32)
    for axis in range(leaf.ndim):
        stride = jnp.uint32(math.prod(leaf.shape[axis + 1 :]) % (1 << 32))
        index = jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis)
        position += (index if axis else index + jnp.uint32(first)) * stride
    mixed = position ^ (position >> 15)
    odd = [position * jnp.uint32(0x9E3779B2) | 1, mixed * jnp.uint32(0x85EBCA6A) | 1]
    return jnp.stack([jnp.sum(bits * factor, dtype=jnp.uint32) for factor in odd])


@functools.partial(jax.jit, static_argnames="sharding")
def _checksums(leaves: list[Array], *, sharding: NamedSharding | None) -> Array:
    sums = jnp.stack([_checksum(leaf) for leaf in leaves])
    return sums if sharding is None else jax.lax.with_sharding_constraint(sums, sharding)


def checksums(items: Mapping[str, Any]) -> dict[str, str]:
    """Sixteen hex digits for every leaf of the items, by "item/path".

    With many processes all must call it, with their parts of the same arrays; all get all sums.
    """
    leaves = tree.flatten(dict(items))
    if not leaves:
        return {}
    where = getattr(next(iter(leaves.values())), "sharding", None)
    everywhere = (
        NamedSharding(where.mesh, PartitionSpec()) if isinstance(where, NamedSharding) else None
    )
    sums = np.asarray(_checksums(list(leaves.values()), sharding=everywhere))
    return {path: f"{a:08x}{b:08x}" for path, (a, b) in zip(leaves, sums.tolist())}


_rows_checksum = jax.jit(_checksum)


class Running:
    """The checksum of a leaf that is read in blocks of rows."""

    def __init__(self) -> None:
        self._sums = np.zeros(2, np.uint32)

    def add(self, rows: Any, first: int) -> None:
        """Rows from number `first` on; every row once, in any order."""
        self._sums = self._sums + np.asarray(_rows_checksum(rows, np.uint32(first)))

    def hex(self) -> str:
        """As `checksums` gives it of the whole leaf."""
        return "".join(f"{x:08x}" for x in self._sums.tolist())


def differences(saved: Mapping[str, str], items: Mapping[str, Any]) -> list[str]:
    """Leaves of `items` whose checksum is not the saved one, or that only one side has, by path.

    Nothing is computed where nothing was saved, as by the first versions.
    """
    if not saved:
        return []
    found = checksums(items)
    wanted = {path: value for path, value in saved.items() if path.split("/")[0] in items}
    return [path for path in sorted(wanted | found) if wanted.get(path) != found.get(path)]
