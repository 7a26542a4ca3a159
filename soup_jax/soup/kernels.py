"""What a step does with arrays of the bank's size, in the form that suits the platform.

These are sums over experts (`combine`), products with experts (`inner`) and updates of experts in
place (`update_stacks`). Some have two forms: XLA is many times slower with one of them on CPUs, or
copies the bank with the other on accelerators. The comments say what each avoids.
"""

import contextlib
import contextvars
import functools
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from soup_jax.shapes import Array

_only: contextvars.ContextVar[str] = contextvars.ContextVar("only", default="")

# (coefficients [S, E], leaf [S, ...], first expert, number of experts) -> [number, ...]
ExpertSum = Callable[[Array, Array, Array | int, int], Array]

# Terms of such a sum up to which a CPU adds them inside the update: no array of the sum exists and
# all cores take part. Above it, reading the terms anew for every expert costs more.
_FUSED_TERMS = 8


def by_platform(*arguments: Any, cpu: Callable[..., Any], accelerator: Callable[..., Any]) -> Any:
    """The value of the form for the platform that is compiled for; both take `arguments`."""
    if form := _only.get():
        return {"cpu": cpu, "accelerator": accelerator}[form](*arguments)
    return jax.lax.platform_dependent(*arguments, cpu=cpu, default=accelerator)


@contextlib.contextmanager
def only(form: str) -> Iterator[None]:
    """Inside the block one form is traced whatever the platform: "cpu" or "accelerator".

    For tests, which have no accelerator and compare the forms.
    """
    token = _only.set(form)
    try:
        yield
    finally:
        _only.reset(token)


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

    def either(leaf_M: Array, leaf_E: Array) -> Array:
        if not whole:
            return product(leaf_M, leaf_E)
        return by_platform(leaf_M, leaf_E, cpu=flat, accelerator=product)

    return _in_parts(either, leaf_M, leaf_E, axis=1)


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
        return _added(jnp.split(product(parts, leaf_E), 2, axis))

    def converted(x_M: Array, leaf_E: Array) -> Array:
        return product(x_M, leaf_E.astype(jnp.float32))  # CPUs lack some products of bfloat16

    return by_platform(x_M, leaf_E, cpu=converted, accelerator=split)


def over_mixtures(leaf_M: Array) -> Array:
    """sum_m leaf_m."""

    def added(leaf_M: Array) -> Array:
        # XLA's sum over a leading dimension takes a CPU many times as long.
        return _added(leaf_M[m] for m in range(leaf_M.shape[0]))

    return by_platform(leaf_M, cpu=added, accelerator=lambda x: x.sum(0))


def weighted_norm(weight_MM: Array, leaf_M: Array) -> Array:
    """sum_{m,m'} weight_mm' <leaf_m, leaf_m'>."""

    def by_gram(weight_MM: Array, leaf_M: Array) -> Array:
        return jnp.sum(weight_MM * inner(leaf_M, leaf_M))

    def by_product(weight_MM: Array, leaf_M: Array) -> Array:
        # A CPU takes twice as long for so few sums over so many numbers, half of it for a
        # transposed copy.
        return jnp.sum(leaf_M * combine(weight_MM, leaf_M))

    return by_platform(weight_MM, leaf_M, cpu=by_product, accelerator=by_gram)


def computed_once(function: Callable[[Any], Any], argument: Any, *, good: Array | bool) -> Any:
    """`function(argument)`, zeros if not `good`, for use inside loops over experts.

    A CPU's compiler would compute it again for every expert, were it not behind a branch.
    """

    def masked(argument: Any) -> Any:
        return jax.tree.map(lambda x: jnp.where(good, x, 0.0), function(argument))

    def apart(argument: Any) -> Any:
        shapes = jax.eval_shape(function, argument)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.cond(good, function, lambda _: zeros, argument)

    return by_platform(argument, cpu=apart, accelerator=masked)


def _update_blocks(
    functions: Sequence[Callable[..., Array]], stacks: Sequence[Array], *, block_size: int
) -> tuple[Array, ...]:
    # What the functions need in between exists for one block at a time, so that temporaries do not
    # grow with the number of experts. Each sees the new blocks of those before it: if all were
    # computed from old blocks, XLA would copy whole stacks on CPUs.
    num = stacks[0].shape[0]

    def step(first: Array | int, size: int, stacks: Sequence[Array]) -> tuple[Array, ...]:
        done = list(stacks)
        for i, function in enumerate(functions):
            new = function(first, *(jax.lax.dynamic_slice_in_dim(x, first, size) for x in done))
            done[i] = jax.lax.dynamic_update_slice_in_dim(done[i], new, first, 0)
        return tuple(done)

    if num <= block_size:
        return step(0, num, stacks)
    whole = num // block_size
    stacks = jax.lax.fori_loop(
        0, whole, lambda i, x: step(i * block_size, block_size, x), tuple(stacks)
    )
    if num % block_size:
        stacks = step(whole * block_size, num % block_size, stacks)
    return tuple(stacks)


def block_size(num_terms: int, num_experts: int) -> int:
    """Experts that an update takes at a time on accelerators, for sums over `num_terms` arrays.

    Every block reads the terms again: with twice as many experts a block, that is a quarter of what
    reading and writing the experts costs. At most a quarter of the experts, as a compiler may keep
    a few arrays of a block's size.
    """
    return max(8, min(2 * num_terms, num_experts // 4))


def _dot_sum(coefficient_SE: Array, leaf_S: Array, first: Array | int, size: int) -> Array:
    part = jax.lax.dynamic_slice_in_dim(coefficient_SE, first, size, axis=1)
    return jnp.einsum("SE,S...->E...", part, leaf_S, precision="highest")


def _fused_sum(coefficient_SE: Array, leaf_S: Array, first: Array | int, size: int) -> Array:
    part = jax.lax.dynamic_slice_in_dim(coefficient_SE, first, size, axis=1)
    part = part.reshape(*part.shape, *[1] * (leaf_S.ndim - 1))
    return _added(part[s] * leaf_S[s] for s in range(leaf_S.shape[0]))


def _added(terms: Iterable[Array]) -> Array:
    return functools.reduce(operator.add, terms)


def update_stacks(
    functions: Callable[[ExpertSum], Sequence[Callable[..., Array]]],
    stacks: Sequence[Array],
    *,
    num_terms: int,
) -> tuple[Array, ...]:
    """Replace stacks [E, ...] in place, where their buffers are donated, by functions of sums over
    a few arrays of one leaf's shape, in the way that suits the platform.

    Args:
      functions: way to form such sums -> one function per stack, (first expert, *blocks of experts)
        -> new block of its stack. They are applied in order and see the new blocks of those
        before.
      stacks: of the same E.
      num_terms: S, how many arrays a sum is over.
    """

    def fused(*stacks: Array) -> tuple[Array, ...]:
        return _update_blocks(functions(_fused_sum), stacks, block_size=stacks[0].shape[0])

    def blocks(*stacks: Array) -> tuple[Array, ...]:
        return _update_blocks(
            functions(_dot_sum), stacks, block_size=block_size(num_terms, stacks[0].shape[0])
        )

    if num_terms > _FUSED_TERMS:
        return blocks(*stacks)
    return by_platform(*stacks, cpu=fused, accelerator=blocks)
