"""Dense experts: a full copy of the leaf for every expert, one stack [E, ...] a leaf."""

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from soup_jax.errors import UserError
from soup_jax.shapes import Array, Params
from soup_jax.soup import kernels


class Dense:
    """The kind "dense". Its gradients stay factored: dE_e = sum_m alpha_me G_m is never formed."""

    factored = True

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
    ) -> Array:
        """[E, ...]: normal, with `init_scale` times the root mean square of the shared leaf as
        standard deviation, independent of each other; 0 makes them zero (see the module `router`
        for when that can train)."""
        if argument:
            raise UserError(f"the rule 'dense' takes no argument, not {argument!r}")
        shape = (num_experts, *leaf.shape)
        if init_scale == 0:
            return jnp.zeros(shape, dtype)
        std = init_scale * jnp.sqrt(jnp.mean(jnp.square(leaf)))
        return (std * jax.random.normal(key, shape)).astype(dtype)

    def combine(self, alpha_ME: Array, stacks: Array, *, mesh: Mesh | None = None) -> Array:
        """sum_e alpha_me E_e, float32 [M, ...]; a bfloat16 bank is not rounded any further."""
        del mesh  # experts are sliced as the leaf is: the sum is local
        return kernels.combine(alpha_ME, stacks)

    def gradient(
        self, alpha_ME: Array, stacks: Array, gradient_M: Array, *, mesh: Mesh | None = None
    ) -> tuple[Array, Params | None]:
        """(dalpha_EM = <E_e, G_m>, None)."""
        del alpha_ME
        return kernels.inner(gradient_M, stacks, whole=mesh is None or mesh.size == 1), None

    def operations(self, stacks: Array) -> float:
        """One multiply-add a parameter."""
        return float(stacks.size)
