"""The bank: expert parameters, one stack per chosen leaf, experts on the leading axis.

A leaf `w` of the base network with the rule "dense" has a stack `w_E...` in the bank; one with the
rule "low_rank:r" has two, of its factors (see `low_rank`); one with the rule "none" has no entry
there, and the merge leaves it as it is. Zero experts is an empty bank.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.rules import low_rank as low_rank_of
from soup_jax.shapes import Array, Params
from soup_jax.soup import low_rank

# (coefficients [S, E], leaf [S, ...], first expert, number of experts) -> [number, ...]
ExpertSum = Callable[[Array, Array, Array | int, int], Array]

# Terms of such a sum up to which a CPU adds them inside the update: no array of the sum exists and
# all cores take part. Above it, reading the terms anew for every expert costs more.
_FUSED_TERMS = 8


def init_bank(
    key: Array,
    shared: Params,
    *,
    num_experts: int,
    rules: Sequence[tuple[str, str]],
    init_scale: float,
    dtype: str = "float32",
) -> Params:
    """The bank for `shared`: nested like it, leaves [E, ...], missing where the rule is "none".

    Dense experts are normal with `init_scale` times the root mean square of the shared leaf as
    standard deviation, independent of each other; 0 makes them zero (see the module `router` for
    when that can train). Factors start as `low_rank.init_factors` says.

    Raises:
      UserError: a leaf that no (regex, rule) pair covers, or that cannot have the rule it has; a
        pair that applies to no leaf; no leaf with experts.
    """
    if num_experts == 0:
        return {}
    leaves = tree.flatten(shared)
    matched = tree.match_rules(rules, list(leaves))
    if set(matched.values()) == {"none"}:
        raise UserError(
            f"num_experts = {num_experts}, but every leaf has the rule 'none': {list(rules)}. "
            "Give some leaves 'dense' or 'low_rank:R', or set num_experts=0 for the generic model"
        )
    bank = {}
    for i, path in enumerate(path for path, rule in matched.items() if rule != "none"):
        leaf = leaves[path]
        if rank := low_rank_of(matched[path]):
            factors = low_rank.init_factors(
                jax.random.fold_in(key, i),
                path,
                leaf.shape,
                num_experts=num_experts,
                rank=rank,
                dtype=dtype,
            )
            bank |= {f"{path}/{name}": factor for name, factor in factors.items()}
            continue
        shape = (num_experts, *leaf.shape)
        if init_scale == 0:
            bank[path] = jnp.zeros(shape, dtype)
            continue
        std = init_scale * jnp.sqrt(jnp.mean(jnp.square(leaf)))
        noise = jax.random.normal(jax.random.fold_in(key, i), shape)
        bank[path] = (std * noise).astype(dtype)
    return tree.unflatten(bank)


def num_experts(bank: Params) -> int:
    """E; 0 for an empty bank."""
    leaves = jax.tree.leaves(bank)
    return leaves[0].shape[0] if leaves else 0


def _update_blocks(
    functions: Sequence[Callable[..., Array]], stacks: Sequence[Array], *, block_size: int
) -> tuple[Array, ...]:
    # What the functions need in between exists for one block at a time, so that temporaries do not
    # grow with the number of experts. Each sees the new blocks of those before it: if all were
    # computed from old blocks, XLA would copy whole stacks on CPUs.
    num = stacks[0].shape[0]

    def step(first: Array | int, size: int, stacks: Sequence[Array]) -> tuple[Array, ...]:
        stacks = list(stacks)
        for i, function in enumerate(functions):
            new = function(first, *(jax.lax.dynamic_slice_in_dim(x, first, size) for x in stacks))
            stacks[i] = jax.lax.dynamic_update_slice_in_dim(stacks[i], new, first, 0)
        return tuple(stacks)

    if num <= block_size:
        return step(0, num, stacks)
    whole = num // block_size
    stacks = jax.lax.fori_loop(
        0, whole, lambda i, x: step(i * block_size, block_size, x), tuple(stacks)
    )
    if num % block_size:
        stacks = step(whole * block_size, num % block_size, stacks)
    return stacks


def block_size(num_terms: int, num_experts: int) -> int:
    """Experts that an update takes at a time on accelerators, for sums over `num_terms` arrays.

    Every block reads the terms again: with twice as many experts a block, that is a quarter of what
    reading and writing the experts costs. At most a quarter of the experts, as a compiler may keep
    a few arrays of a block's size.
    """
    return max(8, min(2 * num_terms, num_experts // 4))


def columns(coefficient_SE: Array, first: Array | int, size: int) -> Array:
    """Columns first..first+size-1 of coefficients [S, E]; `first` may be traced.

    By a product, which is exact: a slice would be taken anew for every element by the loop that
    uses it, and keep that from vector instructions.
    """
    if isinstance(first, int):
        return coefficient_SE[:, first : first + size]
    expert_E = jnp.arange(coefficient_SE.shape[1])[:, None]
    chosen = (expert_E == first + jnp.arange(size)).astype(coefficient_SE.dtype)
    return jnp.dot(coefficient_SE, chosen, precision="highest")


def _dot_sum(coefficient_SE: Array, leaf_S: Array, first: Array | int, size: int) -> Array:
    part = jax.lax.dynamic_slice_in_dim(coefficient_SE, first, size, axis=1)
    return jnp.einsum("SE,S...->E...", part, leaf_S, precision="highest")


def _fused_sum(coefficient_SE: Array, leaf_S: Array, first: Array | int, size: int) -> Array:
    part = columns(coefficient_SE, first, size)
    part = part.reshape(*part.shape, *[1] * (leaf_S.ndim - 1))
    return sum(part[s] * leaf_S[s] for s in range(leaf_S.shape[0]))


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
    return jax.lax.platform_dependent(*stacks, cpu=fused, default=blocks)


def update_block(
    functions: Callable[[ExpertSum], Sequence[Callable[..., Array]]],
    stack: Array,
    first: Array,
    size: int,
    *,
    num_terms: int,
) -> Array:
    """`update_stacks` for the experts first..first+size-1 of one stack; `first` may be traced."""

    def with_sum(expert_sum: ExpertSum) -> Callable[[Array], Array]:
        (function,) = functions(expert_sum)

        def update(stack: Array) -> Array:
            block = function(first, jax.lax.dynamic_slice_in_dim(stack, first, size))
            return jax.lax.dynamic_update_slice_in_dim(stack, block, first, 0)

        return update

    if num_terms > _FUSED_TERMS:
        return with_sum(_dot_sum)(stack)
    return jax.lax.platform_dependent(stack, cpu=with_sum(_fused_sum), default=with_sum(_dot_sum))
