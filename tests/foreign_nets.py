"""Two networks that are not ours, as a user would write them: nothing here knows of soups."""

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx

import soup_jax


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    num_heads: int
    hidden_dim: int

    @nn.compact
    def __call__(self, x, mask):
        y = nn.LayerNorm()(x)
        x = x + nn.MultiHeadDotProductAttention(self.num_heads)(y, mask=mask)
        y = nn.gelu(nn.Dense(self.hidden_dim)(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1])(y)


class Transformer(nn.Module):
    """With learned positions."""

    settings: soup_jax.ModelSettings
    num_blocks: int

    @nn.compact
    def __call__(self, tokens):
        s = self.settings
        embed = nn.Embed(s.vocab_size, s.dim)
        position = self.param("position", nn.initializers.normal(0.02), (s.seq_len, s.dim))
        x = embed(tokens) + position[: tokens.shape[1]]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.num_blocks):
            x = Block(s.num_heads, s.hidden_dim)(x, mask)
        return embed.attend(nn.LayerNorm()(x))


def linen(settings):
    """`model.kind = "foreign_nets:linen"`, with the argument `num_blocks`."""
    return soup_jax.from_linen(Transformer(settings, **dict(settings.args)))


class Convolutional(nnx.Module):
    """Causal convolutions, in a list of layers."""

    def __init__(self, settings, rngs):
        s = settings
        self.embed = nnx.Embed(s.vocab_size, s.dim, rngs=rngs)
        self.layers = nnx.List(
            [
                nnx.Conv(s.dim, s.dim, kernel_size=(4,), padding="CAUSAL", rngs=rngs)
                for _ in range(s.num_layers)
            ]
        )
        self.head = nnx.Linear(s.dim, s.vocab_size, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        for layer in self.layers:
            x = x + jnp.tanh(layer(x))
        return self.head(x)


def nnx_model(settings):
    """`model.kind = "foreign_nets:nnx_model"`."""
    return soup_jax.from_nnx(lambda rngs: Convolutional(settings, rngs))


def nothing(settings):
    """A mistake."""
    return Transformer(settings, 1)
