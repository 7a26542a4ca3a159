"""Storing float32 results in fewer bits: nearest, or stochastic rounding.

Rounding to the nearest loses every update that is smaller than half a unit in the last place of a
bfloat16 number. Stochastic rounding, up with the probability that makes the mean right, keeps it on
average.

The random bits are a hash of an element's index and a seed. They are made inside the fused update:
no array of random bits of the bank's size exists, and every slice makes its own.
"""

import math
import zlib

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from soup_jax.shapes import Array


def store(
    x: Array, dtype: DTypeLike, *, seed: Array | None = None, first: Array | int = 0
) -> Array:
    """float32 `x` in `dtype`, rounded to the nearest, or stochastically if a seed is given.

    Args:
      dtype: float32 or bfloat16; only the latter rounds stochastically.
      seed: uint32 scalar, another one for every leaf and step.
      first: index along the leading dimension of the first row of `x`, when it is a part of a leaf.
    """
    if seed is None or jnp.dtype(dtype) != jnp.bfloat16:
        return x.astype(dtype)
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    noise = _hash(_index(x.shape, first), seed) >> 16
    # Adding to the 16 bits that are cut carries into the kept ones with their probability.
    rounded = jax.lax.bitcast_convert_type((bits + noise) & jnp.uint32(0xFFFF0000), jnp.float32)
    # The carry would turn the largest numbers and NaN into something else.
    safe = jnp.abs(x) < jnp.finfo(jnp.bfloat16).max
    return jnp.where(safe, rounded, x).astype(jnp.bfloat16)


def seed_of(step: Array, name: str) -> Array:
    """uint32 seed of a step (int32 scalar) and a name that tells leaves apart."""
    return _hash(step.astype(jnp.uint32), jnp.uint32(zlib.crc32(name.encode())))


def keep(
    old: Array,
    new: Array,
    *,
    good: Array | bool,
    step: Array,
    stochastic: bool,
    name: str,
    first: Array | int = 0,
) -> Array:
    """What is stored of float32 values: in the old ones' dtype; the old ones if not `good`.

    Args:
      name: of the leaf, another one for everything that is stored in a step.
      first: as in `store`.
    """
    seed = seed_of(step, name) if stochastic else None
    return jnp.where(good, store(new, old.dtype, seed=seed, first=first), old)


def _index(shape: tuple[int, ...], first: Array | int) -> Array:
    # Row-major number of each element, modulo 2**32.
    index = jnp.zeros(shape, jnp.uint32)
    for d in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, d)
        if d == 0:
            along = along + jnp.asarray(first, jnp.uint32)
        index = index + along * jnp.uint32(math.prod(shape[d + 1 :]) & 0xFFFFFFFF)
    return index


def _hash(x: Array, seed: Array) -> Array:
    # Two rounds of a multiply-xorshift mixer on 32 bits; wrap-around is meant.
    x = (x ^ seed) * jnp.uint32(0x9E3779B1)
    x = (x ^ (x >> 15)) * jnp.uint32(0x85EBCA77) + seed
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE3D)
    return x ^ (x >> 16)
