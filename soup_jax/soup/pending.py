"""Updates of experts that are not written yet: expert e is scale_e * bank_e - sum_s weight_se D_s.

Every update of the optimizer `merged` is of rank M: expert e moves along M directions D, common to
all experts, by its own coefficients. The last T M of them are kept in slots; a merge reads them
beside the bank, and in turn they are written to E / T experts at a time.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from soup_jax import tree
from soup_jax.shapes import Array, Params
from soup_jax.soup import bank as experts


class Pending(NamedTuple):
    """What the bank lacks.

    Attributes:
      directions: D, leaves [S, ...], float32; a subset of the bank's leaves, the others lack
        nothing. S = T M slots, filled M at a time.
      weight_SE: float32.
      scale_E: float32, 1 but for weight decay.
    """

    directions: Params
    weight_SE: Array
    scale_E: Array


# (leaf's path, new block of experts, old block, its first expert) -> the new one, as it is stored
Store = Callable[[str, Array, Array, Array | int], Array]


def nothing(bank: Params, paths: Sequence[str], *, num_slots: int) -> Pending:
    """Nothing pending, with room for S = `num_slots` directions of the leaves `paths`."""
    stacks, num = tree.flatten(bank), experts.num_experts(bank)
    directions = {
        path: jnp.zeros((num_slots, *stacks[path].shape[1:]), jnp.float32) for path in paths
    }
    return Pending(tree.unflatten(directions), jnp.zeros((num_slots, num)), jnp.ones((num,)))


def defer(
    pending: Pending,
    direction_M: dict[str, Array],
    weight_ME: Array,
    *,
    shrink: Array,
    slot: Array,
    good: Array | bool,
) -> Pending:
    """Note the update E_e <- shrink * E_e - sum_m weight_me D_m of all experts.

    Args:
      direction_M: by path, leaves [M, ...].
      slot: which M rows it is kept in; nothing of what they held may be pending.
      good: false: nothing changes.
    """
    row = slot * weight_ME.shape[0]

    def kept(path: str, old: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(old, row, weight_ME.shape[0])
        rows = jnp.where(good, direction_M[path], rows)
        return jax.lax.dynamic_update_slice_in_dim(old, rows, row, 0)

    weight_SE = jax.lax.dynamic_update_slice_in_dim(shrink * pending.weight_SE, weight_ME, row, 0)
    return Pending(
        tree.map_named(kept, pending.directions),
        jnp.where(good, weight_SE, pending.weight_SE),
        jnp.where(good, shrink * pending.scale_E, pending.scale_E),
    )


def write_turn(
    pending: Pending, bank: Params, *, turn: Array, num_turns: int, good: Array | bool, store: Store
) -> tuple[Params, Pending]:
    """Write what is pending for one of `num_turns` blocks of experts, in place if donated.

    After `num_turns` turns in a row every expert was written once, so that a slot that was filled
    before them may be filled again.
    """
    num = pending.scale_E.shape[0]
    size = -(-num // num_turns)
    first = jnp.minimum(turn * size, num - size)
    scale_E = jnp.where(good, pending.scale_E, 1.0)
    weight_SE = jnp.where(good, pending.weight_SE, 0.0)
    now = Pending(pending.directions, weight_SE, scale_E)

    def leaf(path: str, stack: Array) -> Array:
        return experts.update_block(
            _written(path, now, store), stack, first, size, num_terms=weight_SE.shape[0]
        )

    written = ((jnp.arange(num) - first) // size == 0) & good
    return _map_some(leaf, bank, pending.directions), Pending(
        pending.directions,
        jnp.where(written, 0.0, pending.weight_SE),
        jnp.where(written, 1.0, pending.scale_E),
    )


def write_all(pending: Pending, bank: Params, *, store: Store) -> tuple[Params, Pending]:
    """Write everything, in place if donated."""

    def leaf(path: str, stack: Array) -> Array:
        functions = _written(path, pending, store)
        return experts.update_stacks(functions, (stack,), num_terms=pending.weight_SE.shape[0])[0]

    return _map_some(leaf, bank, pending.directions), Pending(
        pending.directions, jnp.zeros_like(pending.weight_SE), jnp.ones_like(pending.scale_E)
    )


def _map_some(function: Callable[[str, Array], Array], bank: Params, some: Params) -> Params:
    paths = tree.flatten(some)
    return tree.map_named(lambda path, x: function(path, x) if path in paths else x, bank)


def _written(
    path: str, pending: Pending, store: Store
) -> Callable[[experts.ExpertSum], Sequence[Callable[..., Array]]]:
    direction_S = tree.flatten(pending.directions)[path]

    def functions(expert_sum: experts.ExpertSum) -> Sequence[Callable[..., Array]]:
        def new_expert(first: Array | int, expert: Array) -> Array:
            size = expert.shape[0]
            scale = experts.columns(pending.scale_E[None], first, size)
            scale = scale.reshape(size, *[1] * (expert.ndim - 1))
            moved = expert_sum(pending.weight_SE, direction_S, first, size)
            return store(path, scale * expert.astype(jnp.float32) - moved, expert, first)

        return (new_expert,)

    return functions
