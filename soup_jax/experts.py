"""The bank: expert parameters, one stack per chosen leaf, experts on the leading axis.

A leaf `w` of the base network with the rule "dense" has a stack `w_E...` in the bank; one with the
rule "none" has no entry there, and the merge leaves it as it is. Zero experts is an empty bank.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from soup_jax import tree
from soup_jax.shapes import Array, Params

RULES = ("dense", "none")


def expert_paths(rules: Sequence[tuple[str, str]], shared: Params) -> list[str]:
    """Paths of the leaves that get experts.

    Raises:
      UserError: a leaf that no (regex, rule) pair covers.
    """
    matched = tree.match_rules(rules, list(tree.flatten(shared)))
    return [path for path, rule in matched.items() if rule == "dense"]


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

    Experts are normal with `init_scale` times the root mean square of the shared leaf as standard
    deviation, independent of each other; 0 makes them zero (see the module `router` for when that
    can train).
    """
    if num_experts == 0:
        return {}
    leaves = tree.flatten(shared)
    bank = {}
    for i, path in enumerate(expert_paths(rules, shared)):
        leaf = leaves[path]
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


def update_blocks(
    functions: Sequence[Callable[..., Array]], stacks: Sequence[Array], *, block_size: int
) -> tuple[Array, ...]:
    """Replace stacks [E, ...] block by block of experts, in place where their buffers are donated.

    What the functions need in between then exists for one block at a time: temporaries do not grow
    with the number of experts.

    Args:
      functions: one per stack, (first expert of the block, *blocks) -> new block of its stack, of
        the same shape and dtype. They are applied in order and see the new blocks of those before:
        if each were computed from the old blocks of all, XLA would copy whole stacks on CPUs.
      stacks: of the same E.
      block_size: experts in a block; the last one may be smaller.
    """
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


def update_block(
    function: Callable[[Array, Array], Array], stack: Array, first: Array, size: int
) -> Array:
    """Replace experts first..first+size-1 of a stack [E, ...] by `function(first, block)`, in place
    where its buffer is donated; `first` may be traced."""
    block = jax.lax.dynamic_slice_in_dim(stack, first, size)
    return jax.lax.dynamic_update_slice_in_dim(stack, function(first, block), first, 0)
