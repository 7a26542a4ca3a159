"""The bank: expert parameters of several kinds, experts on the leading axis of every array.

    bank = {"dense": {leaf: [E, ...]}, "low_rank": {leaf: {"left": ..., "right": ...}}}

A kind of experts says how a leaf's experts start, merge and get their gradient. Which leaf of the
base network has which kind is an ordered list of (regex, rule) pairs; a rule is "none" (no experts:
the merge leaves the leaf as it is), or a kind's name and, after a colon, what the kind takes, as in
"low_rank:8". A kind of your own is a dotted path to an object like those here, as in
"my_package.experts:Diagonal", or a name that you `register`. Zero experts is an empty bank.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.registry import Registry
from soup_jax.shapes import Array, Params
from soup_jax.soup.dense import Dense
from soup_jax.soup.low_rank import LowRank


class ExpertKind(Protocol):
    """What the bank asks of a kind of experts.

    The experts of a leaf are `stacks`: an array or a nested dict of them, each [E, ...], stored in
    slices along its other dimensions (`layout.storage`).

    Attributes:
      factored: the bank optimizer takes merged gradients and coefficients, and no gradient of the
        experts exists; their leaves are then shaped [E, *leaf]. Else `gradient` gives one, and
        AdamW takes it.
    """

    factored: bool

    def init(
        self,
        key: Array,
        path: str,
        leaf: Array,
        *,
        num_experts: int,
        argument: str,
        init_scale: float,
        dtype: str,
    ) -> Any:
        """Stacks for the shared leaf, of `dtype`; traceable, and UserError before any work for a
        leaf or an argument (the rule's text behind the colon, "" without) that it cannot take."""

    def combine(self, alpha_ME: Array, stacks: Any, *, mesh: Mesh | None = None) -> Array:
        """sum_e alpha_me E_e, float32 [M, *leaf], on storage slices of `mesh`."""

    def gradient(
        self, alpha_ME: Array, stacks: Any, gradient_M: Array, *, mesh: Mesh | None = None
    ) -> tuple[Array, Any]:
        """(dalpha_EM, gradients like `stacks` or None if `factored`), float32, of `combine`, from
        the merged leaf's gradient [M, *leaf] on storage slices."""

    def operations(self, stacks: Any) -> float:
        """Multiply-adds of `combine` for one mixture; `stacks` may be abstract."""


KINDS: Registry[ExpertKind] = Registry("kind of experts", {"dense": Dense(), "low_rank": LowRank()})
register = KINDS.register


def parse_rule(rule: str) -> tuple[str, str]:
    """(name of the kind, argument) of a rule; ("", "") of "none".

    Raises:
      UserError: no such kind, with the nearest one.
    """
    if rule == "none":
        return "", ""
    name, _, argument = rule.partition(":")
    if name not in KINDS.names() and argument[:1].isidentifier():
        # A dotted path has a colon of its own.
        attribute, _, argument = argument.partition(":")
        name = f"{name}:{attribute}"
    try:
        kind_of(name)
    except UserError as e:
        raise UserError(
            f"{rule!r} is no rule for experts: {e}. Rules are 'none', 'dense', 'low_rank:R' with a "
            "rank R of at least 1, or a kind of your own"
        ) from e
    return name, argument


def kind_of(name: str) -> ExpertKind:
    """The kind of that name or dotted path; of a class, an instance."""
    found = KINDS.get(name)
    return found() if isinstance(found, type) else found


def init_bank(
    key: Array,
    shared: Params,
    *,
    num_experts: int,
    rules: Sequence[tuple[str, str]],
    init_scale: float,
    dtype: str = "float32",
) -> Params:
    """The bank for `shared`, by kind; a kind's part is nested like it, without other leaves.

    Raises:
      UserError: a leaf that no (regex, rule) pair covers, or that cannot have the rule it has; no
        leaf with experts.
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
    parts: dict[str, dict[str, Any]] = {}
    for i, path in enumerate(path for path, rule in matched.items() if rule != "none"):
        name, argument = parse_rule(matched[path])
        parts.setdefault(name, {})[path] = kind_of(name).init(
            jax.random.fold_in(key, i),
            path,
            leaves[path],
            num_experts=num_experts,
            argument=argument,
            init_scale=init_scale,
            dtype=dtype,
        )
    return {name: tree.unflatten(part) for name, part in parts.items()}


def by_leaf(part: Params, like: Params) -> dict[str, Any]:
    """Path -> stacks of a kind's part; `like` has the leaves of the base network."""
    found = {}
    for path in tree.flatten(like):
        stacks: Any = part
        for key in path.split("/"):
            stacks = stacks.get(key) if isinstance(stacks, Mapping) else None
        if stacks is not None:
            found[path] = stacks
    return found


def combine(
    shared: Params, bank: Params, alpha_ME: Array, *, mesh: Mesh | None = None
) -> dict[str, Array]:
    """Path -> sum_e alpha_me E_e, float32 [M, ...], of the leaves that have experts."""
    return {
        path: kind_of(name).combine(alpha_ME, stacks, mesh=mesh)
        for name, part in bank.items()
        for path, stacks in by_leaf(part, shared).items()
    }


@jax.named_scope("bank_gradients")
def gradients(
    merged: Params, bank: Params, alpha_ME: Array, *, mesh: Mesh | None = None
) -> tuple[Array, Params]:
    """(dalpha_EM, gradients by kind of experts whose gradients are not factored), float32.

    In this order, to be transposed after all sums: XLA turns a transposed product around, and a CPU
    then takes many times as long.

    Args:
      merged: G_m, leaves [M, ...].
    """
    gradient_M = tree.flatten(merged)
    total_EM, explicit = jnp.zeros_like(alpha_ME.T), {}
    for name, part in bank.items():
        kind = kind_of(name)
        found, of_kind = {}, jnp.zeros_like(total_EM)
        for path, stacks in by_leaf(part, merged).items():
            dalpha_EM, found[path] = kind.gradient(alpha_ME, stacks, gradient_M[path], mesh=mesh)
            of_kind = of_kind + dalpha_EM
        total_EM = total_EM + of_kind
        if not kind.factored:
            explicit[name] = tree.unflatten(found)
    return total_EM, explicit


def num_experts(bank: Params) -> int:
    """E; 0 for an empty bank."""
    leaves = jax.tree.leaves(bank)
    return leaves[0].shape[0] if leaves else 0
