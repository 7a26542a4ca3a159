"""Low-rank experts: E_e = U_e V_e on matrices.

A leaf `w` [..., a, b] with the rule "low_rank:r" has two stacks in the bank, `left`
[E, ..., a, r] and `right` [E, ..., r, b]; r (a + b) numbers an expert instead of a b. The merge

    sum_e alpha_e U_e V_e = [alpha_1 U_1, ..., alpha_E U_E] [V_1; ...; V_E]

is one product over experts and ranks jointly, with alpha folded into the smaller factor. No expert
is ever multiplied out. Its price is arithmetic: 2 M E r a b operations, r times those of the dense
merge; and twice that for the gradient. Gradients of the factors are as small as the factors, so
they are explicit, and any optimizer can take them.

Over devices the factors are stored in slices, like everything. The slice of the merged leaf that a
device computes is cut along one dimension, say b: then V's slices are where they are needed, and U
is gathered whole, E a r numbers; the gradient of U is summed over devices back into slices. So
unlike that of dense experts this communication grows with E r. It is the smaller factor that
moves, as the larger dimension is cut, one leaf at a time (tests/contract_test.py). Compiled for
CPUs a step gathers each once and keeps it for the backward pass; for TPUs it gathers twice, and
some of the sums are all-reduces, several leaves in one.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.shapes import Array, Params
from soup_jax.soup import layout

_Dims = dict[int, tuple[str, ...]]  # mesh axes by the dimension that they cut


class LowRank:
    """The kind "low_rank:r". Its gradients are explicit."""

    factored = False

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
    ) -> dict[str, Array]:
        """{"left": [E, ..., a, r], "right": [E, ..., r, b]} of a leaf [..., a, b].

        `left` is normal with variance 1 / r and `right` zero, whatever `init_scale`. So the merged
        model starts as S; experts separate whatever the router, as their left factors differ; and a
        step of Adam on `right` moves the elements of the product by about its rate.

        Raises:
          UserError: r is no number from 1 on, the leaf is no matrix, or its factors would be no
            smaller rank than itself.
        """
        del init_scale
        rank = _rank(argument, path, leaf.shape)
        *leading, a, b = leaf.shape
        left = jax.random.normal(key, (num_experts, *leading, a, rank)) / rank**0.5
        return {
            "left": left.astype(dtype),
            "right": jnp.zeros((num_experts, *leading, rank, b), dtype),
        }

    def combine(
        self, alpha_ME: Array, stacks: Mapping[str, Array], *, mesh: Mesh | None = None
    ) -> Array:
        """See `combine`."""
        return combine(alpha_ME, stacks["left"], stacks["right"], mesh=mesh)

    def gradient(
        self,
        alpha_ME: Array,
        stacks: Mapping[str, Array],
        gradient_M: Array,
        *,
        mesh: Mesh | None = None,
    ) -> tuple[Array, dict[str, Array]]:
        """See `gradient`."""
        dalpha_ME, left, right = gradient(
            alpha_ME, stacks["left"], stacks["right"], gradient_M, mesh=mesh
        )
        return dalpha_ME.T, {"left": left, "right": right}

    def operations(self, stacks: Mapping[str, Array]) -> float:
        """E ... a r b: r times as many as those of a dense expert."""
        return float(stacks["left"].size * stacks["right"].shape[-1])


def _rank(argument: str, path: str, shape: tuple[int, ...]) -> int:
    rule = f"low_rank:{argument}"
    if not re.fullmatch("[1-9][0-9]*", argument):
        raise UserError(
            f"{rule.rstrip(':')!r} is no rule for experts: write 'low_rank:R', with a rank R of at "
            "least 1, as in 'low_rank:8'"
        )
    if not tree.is_matrix(path, len(shape)):
        raise UserError(
            f"the leaf {path!r} {tuple(shape)} is no matrix and cannot have the rule {rule!r}; "
            "give it 'dense' or 'none'"
        )
    if int(argument) >= min(shape[-2:]):
        raise UserError(
            f"the rule {rule!r} for the leaf {path!r} {tuple(shape)}: the rank must be less than "
            f"{min(shape[-2:])}, the smaller of its last two dimensions; give it 'dense' or 'none'"
        )
    return int(argument)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """A leaf [..., a, b] that is merged in no array: every row of a batch has its own coefficients.

    x (S + sum_e alpha_e U_e V_e) = x S + (alpha_e x U_e)_e V, whose matrices are those of all rows:
    texts of many specialists are one batch. It costs E r (a + b) multiply-adds a row beside a b.

    Attributes:
      shared: S.
      left: U of all experts, [..., a, E r]; `right`: V, [..., E r, b].
      alpha_RE: of each row; None until they are known.
    """

    shared: Array
    left: Array
    right: Array
    alpha_RE: Array | None = None

    def astype(self, dtype: Any) -> "Rows":
        """With arrays of another type."""
        return jax.tree.map(lambda x: x.astype(dtype), self)

    def row_product(self, x_RLD: Array) -> Array:
        """x [R, L, a] -> [R, L, b]."""
        assert self.alpha_RE is not None
        rank = self.left.shape[-1] // self.alpha_RE.shape[-1]
        scale_RF = jnp.repeat(self.alpha_RE, rank, axis=-1).astype(x_RLD.dtype)
        return x_RLD @ self.shared + ((x_RLD @ self.left) * scale_RF[:, None]) @ self.right


def unmerged(shared: Params, bank: Params, *, leaves: str) -> Params | None:
    """The shared parameters with `Rows` in place of the leaves that have experts, for any number of
    specialists together.

    Args:
      leaves: regex of those that may be `Rows` (`BaseModel.row_products`).

    Returns:
      None where a leaf has dense experts or may not be `Rows`, or where all factors have more
      numbers than the shared parameters: then merging is cheaper.
    """
    if set(bank) != {"low_rank"}:
        return None
    flat = tree.flatten(shared)
    factors: dict[str, dict[str, Array]] = {}
    for name, array in tree.flatten(bank["low_rank"]).items():
        path, _, side = name.rpartition("/")
        factors.setdefault(path, {})[side] = array
    size = sum(array.size for pair in factors.values() for array in pair.values())
    if not all(re.fullmatch(leaves, path) for path in factors) or size > sum(
        array.size for array in flat.values()
    ):
        return None
    return tree.unflatten(
        {p: _rows(leaf, **factors[p]) if p in factors else leaf for p, leaf in flat.items()}
    )


def _rows(shared: Array, *, left: Array, right: Array) -> Rows:
    # Experts beside their ranks: [E, ..., a, r] -> [..., a, E r], [E, ..., r, b] -> [..., E r, b].
    left = jnp.moveaxis(left, 0, -2)
    right = jnp.moveaxis(right, 0, -3)
    left = left.reshape(*left.shape[:-2], -1)
    right = right.reshape(*right.shape[:-3], -1, right.shape[-1])
    return Rows(shared, left.astype(shared.dtype), right.astype(shared.dtype))


def with_coefficients(params: Any, alpha_RE: Array) -> Any:
    """The same parameters with the coefficients of each row in their `Rows`."""

    def give(leaf: Any) -> Any:
        if isinstance(leaf, Rows):
            return dataclasses.replace(leaf, alpha_RE=alpha_RE)
        return leaf

    return jax.tree.map(give, params, is_leaf=lambda leaf: isinstance(leaf, Rows))


def combine(alpha_ME: Array, left: Array, right: Array, *, mesh: Mesh | None = None) -> Array:
    """sum_e alpha_me left_e right_e, float32 [M, ..., a, b], one mixture after the other.

    Args:
      mesh: the result lies on slices of it; None leaves that to the compiler.
    """

    def local(alpha_ME: Array, left: Array, right: Array) -> Array:
        left, right = left.astype(jnp.float32), right.astype(jnp.float32)
        return jax.lax.map(lambda alpha_E: _product(alpha_E, left, right), alpha_ME)

    if mesh is None or mesh.size == 1:
        return local(alpha_ME, left, right)
    dims, left_dims, right_dims = _compute_dims(mesh, left, right)
    specs = (P(), _spec(left_dims), _spec(right_dims))
    return _shard_map(local, mesh, specs, _spec(dims))(alpha_ME, left, right)


def gradient(
    alpha_ME: Array, left: Array, right: Array, gradient_M: Array, *, mesh: Mesh | None = None
) -> tuple[Array, Array, Array]:
    """(dalpha_me, dleft, dright), float32, of `combine`, by the chain rule.

    Args:
      gradient_M: of the merged leaf, [M, ..., a, b], on slices.
      mesh: as in `combine`.
    """
    if mesh is None or mesh.size == 1:
        return _local_gradient(alpha_ME, left, right, gradient_M)
    dims, left_dims, right_dims = _compute_dims(mesh, left, right)
    a, b = (dims.get(right.ndim - i, ()) for i in (3, 2))  # the axes that cut either dimension
    # What each device has is its part of a sum; the sum's slices go where they are stored.
    left_stored = _slices(mesh, left, kept=left_dims, summed=b)
    right_stored = _slices(mesh, right, kept=right_dims, summed=a)

    def local(*arguments: Array) -> tuple[Array, Array, Array]:
        dalpha_ME, dleft, dright = _local_gradient(*arguments)
        return (
            jax.lax.psum(dalpha_ME, tuple(axis for axes in dims.values() for axis in axes)),
            _sum(dleft, b, left_stored),
            _sum(dright, a, right_stored),
        )

    specs = (P(), _spec(left_dims), _spec(right_dims), _spec(dims))
    out = (P(), _spec(left_dims | left_stored), _spec(right_dims | right_stored))
    return _shard_map(local, mesh, specs, out)(alpha_ME, left, right, gradient_M)


def _product(alpha_E: Array, left: Array, right: Array) -> Array:
    alpha_E = alpha_E.reshape(-1, *[1] * (left.ndim - 1))
    if left.size < right.size:
        left = alpha_E * left
    else:
        right = alpha_E * right
    return jnp.einsum("E...ar,E...rb->...ab", left, right, precision="highest")


def _local_gradient(
    alpha_ME: Array, left: Array, right: Array, gradient_M: Array
) -> tuple[Array, Array, Array]:
    factors = left.astype(jnp.float32), right.astype(jnp.float32)

    def add(total: tuple[Array, ...], mixture: tuple[Array, Array]) -> tuple[Any, Array]:
        alpha_E, g = mixture
        dalpha_E, *dfactors = jax.vjp(_product, alpha_E, *factors)[1](g)
        return tuple(x + dx for x, dx in zip(total, dfactors)), dalpha_E

    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in factors)
    (dleft, dright), dalpha_ME = jax.lax.scan(add, zeros, (alpha_ME, gradient_M))
    return dalpha_ME, dleft, dright


def _compute_dims(mesh: Mesh, left: Array, right: Array) -> tuple[_Dims, _Dims, _Dims]:
    # How the merged leaf is cut, and the parts of the factors that a device needs for its slice.
    shape = (*left.shape[1:-1], right.shape[-1])
    dims, last = layout.slice_dims(shape, mesh), len(shape) - 1
    left_dims = {d: axes for d, axes in dims.items() if d != last}
    right_dims = {d: axes for d, axes in dims.items() if d != last - 1}
    return dims, left_dims, right_dims


def _slices(mesh: Mesh, factor: Array, *, kept: _Dims, summed: tuple[str, ...]) -> _Dims:
    stored = layout.slice_dims(factor.shape[1:], mesh)
    return {d: axes for d, axes in stored.items() if axes == summed and d not in kept}


def _sum(x: Array, axes: tuple[str, ...], slices: _Dims) -> Array:
    if not axes:
        return x
    for dim in slices:
        return jax.lax.psum_scatter(x, axes, scatter_dimension=dim + 1, tiled=True)
    return jax.lax.psum(x, axes)


def _spec(dims: _Dims) -> P:
    # Of arrays with E or M in front.
    return P(None, *(dims.get(d) for d in range(max(dims, default=-1) + 1)))


def _shard_map(
    function: Callable[..., Any], mesh: Mesh, in_specs: tuple[P, ...], out_specs: Any
) -> Callable[..., Any]:
    return jax.shard_map(
        function, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )
