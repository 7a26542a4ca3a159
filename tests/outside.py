"""What somebody adds from outside, named "outside:NAME" in configs: no file of ours knows of it."""

import math

import jax
import jax.numpy as jnp
import optax

from soup_jax import tree


class Offset:
    """A kind of experts with explicit gradients: one vector an expert, added to every row.

    The rule's argument is the standard deviation of its start.
    """

    factored = False

    def init(self, key, path, leaf, *, num_experts, argument, init_scale, dtype):
        shape = (num_experts, *[1] * (leaf.ndim - 1), leaf.shape[-1])
        return (float(argument or init_scale) * jax.random.normal(key, shape)).astype(dtype)

    def combine(self, alpha_ME, stacks, *, mesh=None):
        return jnp.einsum("ME,E...->M...", alpha_ME, stacks.astype(jnp.float32))

    def gradient(self, alpha_ME, stacks, gradient_M, *, mesh=None):
        g_M = gradient_M.sum(tuple(range(1, gradient_M.ndim - 1)), keepdims=True)
        dalpha_EM = jnp.einsum("E...,M...->EM", stacks.astype(jnp.float32), g_M)
        return dalpha_EM, jnp.einsum("ME,M...->E...", alpha_ME, g_M)

    def operations(self, stacks):
        return float(math.prod(stacks.shape))


class Sgd:
    """A bank optimizer: expert e moves by -lr * sum_m alpha_me G_m, and the steps are counted."""

    layout = {"count": "everywhere"}  # noqa: RUF012
    bank_passes, state_passes = 2.0, 0.0

    def __init__(self, config):
        del config

    def init(self, bank):
        return {"count": jnp.zeros((), jnp.int32)}

    def update(self, merged, alpha_ME, bank, state, *, step, lr, good=True):
        gradient_M = tree.flatten(merged)

        def moved(path, expert):
            move = jnp.einsum("ME,M...->E...", alpha_ME, gradient_M[path])
            return jnp.where(good, expert - lr * move, expert).astype(expert.dtype)

        return tree.map_named(moved, bank), {"count": state["count"] + jnp.asarray(good, jnp.int32)}

    def reach(self, alpha_ME):
        return jnp.square(alpha_ME).sum(-1).mean()


def momentum(rate, config, *, weight_decay, decay=0.9):
    """An optimizer of the shared parameters."""
    del config, weight_decay
    return optax.sgd(rate, momentum=decay)
