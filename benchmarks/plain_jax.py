"""Time of our dense step against a plain Flax training loop of the same network, in one run.

    python benchmarks/plain_jax.py [--rounds=15]

The plain one is what the Flax examples do: a Linen decoder whose layers are modules in a Python
loop, optax's cross-entropy and AdamW with clipping, one jitted function that donates its state.
Ours is `train_step` with `num_experts=0`: layers scanned, metrics by domain, a guard against
updates that are not finite. Float32, the same shapes and random tokens; one after the other in
every round. The first step is timed apart: nearly all of it is compilation.
"""

import argparse
import statistics
import time

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax.training import train_state

from soup_jax.experiments import base


def rotate(x, theta):
    """[B, L, H, head_dim], halves of a head rotated by position."""
    half = x.shape[-1] // 2
    angle = jnp.arange(x.shape[1])[:, None] * theta ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[:, None], jnp.sin(angle)[:, None]
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


class Layer(nn.Module):
    dim: int
    num_heads: int
    hidden_dim: int
    theta: float

    @nn.compact
    def __call__(self, x):
        y = nn.RMSNorm()(x)
        heads = (self.num_heads, self.dim // self.num_heads)
        query, key, value = (nn.DenseGeneral(heads, use_bias=False)(y) for _ in range(3))
        y = jax.nn.dot_product_attention(
            rotate(query, self.theta), rotate(key, self.theta), value, is_causal=True
        )
        x = x + nn.DenseGeneral(self.dim, axis=(-2, -1), use_bias=False)(y)
        y = nn.RMSNorm()(x)
        gate, up = (nn.Dense(self.hidden_dim, use_bias=False)(y) for _ in range(2))
        return x + nn.Dense(self.dim, use_bias=False)(nn.silu(gate) * up)


class Decoder(nn.Module):
    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    hidden_dim: int
    theta: float

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(self.vocab_size, self.dim)
        x = embed(tokens)
        for _ in range(self.num_layers):
            x = Layer(self.dim, self.num_heads, self.hidden_dim, self.theta)(x)
        return embed.attend(nn.RMSNorm()(x))


def plain_step(state, tokens):
    def loss_of(params):
        logits = state.apply_fn({"params": params}, tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean()

    loss, grads = jax.value_and_grad(loss_of)(state.params)
    return state.apply_gradients(grads=grads), loss


class Plain:
    """The Flax loop; `advance()` is one step, waited for."""

    def __init__(self, cfg, tokens):
        m, o = cfg.model, cfg.optimizer
        module = Decoder(
            cfg.vocab_size, m.num_layers, m.dim, m.num_heads, m.hidden_dim, m.rope_theta
        )
        params = jax.jit(module.init)(jax.random.key(0), tokens[:1, :-1])["params"]
        rate = optax.warmup_cosine_decay_schedule(
            0.0, o.learning_rate, o.warmup_steps, cfg.num_steps, o.final_fraction * o.learning_rate
        )
        tx = optax.chain(
            optax.clip_by_global_norm(o.clip_norm),
            optax.adamw(
                rate,
                b1=o.beta1,
                b2=o.beta2,
                eps=o.eps,
                weight_decay=o.weight_decay,
                mask=lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
            ),
        )
        self.state = train_state.TrainState.create(apply_fn=module.apply, params=params, tx=tx)
        self.step, self.tokens = jax.jit(plain_step, donate_argnums=0), tokens

    def advance(self):
        self.state, _ = self.step(self.state, self.tokens)
        jax.block_until_ready(self.state)


class Ours:
    """Our step behind the same interface."""

    def __init__(self, cfg):
        self.training = common.build(cfg)

    def advance(self):
        self.training.advance()
        jax.block_until_ready(self.training.state)


def seconds_of(variant):
    start = time.perf_counter()
    variant.advance()
    return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=15)
    for name, value in (("dim", 256), ("layers", 4), ("hidden", 704), ("heads", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("seq_len", 256), ("batch_size", 8)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    cfg = base.get_config()
    base.set_generic(cfg)
    cfg.seq_len, cfg.batch_size = args.seq_len, args.batch_size
    cfg.model.update({"num_layers": args.layers, "dim": args.dim, "hidden_dim": args.hidden})
    cfg.model.num_heads = cfg.model.num_kv_heads = args.heads
    ours = Ours(cfg)
    plain = Plain(cfg, ours.training.batch.rows["tokens"])
    sizes = [
        sum(x.size for x in jax.tree.leaves(params))
        for params in (plain.state.params, ours.training.state.params)
    ]
    if sizes[0] != sizes[1]:
        raise SystemExit(f"not the same network: {sizes} parameters")
    first = {"plain": seconds_of(plain), "ours": seconds_of(ours)}
    seconds = {name: [] for name in first}
    for _ in range(args.rounds):
        for name, variant in (("plain", plain), ("ours", ours)):
            seconds[name].append(seconds_of(variant))
    print(f"{sizes[0]:,} parameters, {args.batch_size} rows of {args.seq_len} tokens")
    print(f"{'variant':<8}{'first step, s':>14}{'median ms':>11}{'plain / it':>12}")
    for name, values in seconds.items():
        ratio = statistics.median(p / v for p, v in zip(seconds["plain"], values))
        print(
            f"{name:<8}{first[name]:>14.1f}{1e3 * statistics.median(values):>11.1f}{ratio:>12.2f}"
        )


if __name__ == "__main__":
    main()
