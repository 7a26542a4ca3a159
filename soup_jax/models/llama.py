"""The shipped network: a Llama-style decoder in Flax Linen.

RMSNorm, rotary positions, SwiGLU, optional grouped-query attention and tied embeddings, layers
scanned (parameters stacked on a leading N). It knows nothing of soups. Its weights follow the
layout `x @ w`; the rotary embedding rotates the two halves of a head, as Hugging Face's
`LlamaForCausalLM` does.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from soup_jax.models.ops import attend, logits, look_up, matmul, token_losses
from soup_jax.shapes import Array, Params

# Results of products by weights, which `remat = "dots"` keeps for the backward pass. By name: jax's
# own policies for products would also keep the attention scores, which are larger than all of these
# together, or under vmap over mixtures nothing.
SAVED_DOTS = ("projected", "attended", "attention_out", "mlp_hidden")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Static shape and policy of the decoder; fields as in the `model` section of a config."""

    vocab_size: int
    num_layers: int
    dim: int
    num_heads: int
    num_kv_heads: int
    hidden_dim: int
    tie_embeddings: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    dtype: str = "float32"
    remat: str = "none"
    attention: str = "auto"
    loss_chunk: int = 0

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.dim // self.num_heads


def llama_config(cfg: ConfigDict) -> LlamaConfig:
    """The decoder of a config."""
    fields = {k: v for k, v in cfg.model.items() if k != "kind"}
    return LlamaConfig(vocab_size=cfg.vocab_size, **fields)


def _normal(std: float, *axes: str) -> Callable[..., Any]:
    return nn.with_logical_partitioning(nn.initializers.normal(std), axes)


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed",))
        scale_D = self.param("scale", init, (x.shape[-1],))
        # As one matrix: with a dimension of 1 beside that of mixtures (one window each), XLA's sums
        # take a CPU 20 times as long.
        y = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * scale_D.astype(jnp.float32)).astype(x.dtype).reshape(x.shape)


def rotate(x: Array, position_BL: Array, theta: float) -> Array:
    """Rotary position embedding of x [B, L, H, head_dim]; angles in float32."""
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = position_BL[..., None, None].astype(jnp.float32) * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cos - second * sin, second * cos + first * sin], axis=-1
    ).astype(x.dtype)


class Attention(nn.Module):
    """Causal multi-head attention, with a key-value cache when `cache_len` is set."""

    cfg: LlamaConfig
    cache_len: int = 0

    @nn.compact
    def __call__(self, x: Array, position_BL: Array) -> Array:
        """[B, L, D], positions [B, L] -> [B, L, D]."""
        c = self.cfg
        std = c.dim**-0.5
        heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        projected = {}
        for name, num_heads in heads.items():
            w = self.param(
                name, _normal(std, "embed", "heads"), (c.dim, num_heads * c.head_dim)
            ).astype(x.dtype)
            y = checkpoint_name(matmul(x, w), "projected")
            projected[name] = y.reshape(*x.shape[:2], num_heads, c.head_dim)
        query = rotate(projected["query"], position_BL, c.rope_theta)
        key = rotate(projected["key"], position_BL, c.rope_theta)
        value = projected["value"]
        if self.cache_len:
            y = self._cached(query, key, value, position_BL)
        else:
            y = attend(query, key, value, kind=c.attention)
        out_std = std * (2 * c.num_layers) ** -0.5
        out = self.param("out", _normal(out_std, "heads", "embed"), (c.dim, c.dim))
        y = checkpoint_name(y.reshape(*x.shape), "attended")
        return checkpoint_name(matmul(y, out.astype(x.dtype)), "attention_out")

    def _cached(self, query: Array, key: Array, value: Array, position_BL: Array) -> Array:
        # Positions are the same for all rows: rows of one call are written at one place.
        shape = (key.shape[0], self.cache_len, *key.shape[2:])
        cached_key = self.variable("cache", "key", jnp.zeros, shape, key.dtype)
        cached_value = self.variable("cache", "value", jnp.zeros, shape, value.dtype)
        start = (0, position_BL[0, 0], 0, 0)
        cached_key.value = jax.lax.dynamic_update_slice(cached_key.value, key, start)
        cached_value.value = jax.lax.dynamic_update_slice(cached_value.value, value, start)
        visible = jnp.arange(self.cache_len)[None, None, :] <= position_BL[:, :, None]
        return jax.nn.dot_product_attention(
            query, cached_key.value, cached_value.value, mask=visible[:, None]
        )


class Mlp(nn.Module):
    """SwiGLU."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        c = self.cfg
        std = c.dim**-0.5
        shape = (c.dim, c.hidden_dim)
        gate_DF = self.param("gate", _normal(std, "embed", "mlp"), shape).astype(x.dtype)
        up_DF = self.param("up", _normal(std, "embed", "mlp"), shape).astype(x.dtype)
        out_std = c.hidden_dim**-0.5 * (2 * c.num_layers) ** -0.5
        down_FD = self.param("down", _normal(out_std, "mlp", "embed"), shape[::-1])
        gate = checkpoint_name(matmul(x, gate_DF), "mlp_hidden")
        up = checkpoint_name(matmul(x, up_DF), "mlp_hidden")
        return matmul(nn.silu(gate) * up, down_FD.astype(x.dtype))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and a residual connection."""

    cfg: LlamaConfig
    cache_len: int = 0

    @nn.compact
    def __call__(self, x: Array, position_BL: Array) -> tuple[Array, None]:
        """[B, L, D] -> [B, L, D], in the form that `nn.scan` wants."""
        eps = self.cfg.norm_eps
        x = x + Attention(self.cfg, self.cache_len, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), position_BL
        )
        return x + Mlp(self.cfg, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), None


class Llama(nn.Module):
    """Tokens to logits; `gather` gets a layer's parameters where they are used."""

    cfg: LlamaConfig
    cache_len: int = 0
    gather: Callable[[Params], Params] | None = None

    @nn.compact
    def __call__(
        self,
        token_BL: Array,
        position_BL: Array | None = None,
        *,
        target_BL: Array | None = None,
    ) -> Array:
        """Logits, or the losses of given targets.

        Args:
          token_BL: int32.
          position_BL: default 0..L-1.
          target_BL: int32. Given, the logits are never all held at once (see `token_losses`).

        Returns:
          float32 logits [B, L, V], or with targets cross-entropies in nats [B, L].
        """
        c = self.cfg
        if position_BL is None:
            position_BL = jnp.broadcast_to(jnp.arange(token_BL.shape[1]), token_BL.shape)
        embedding_VD = self.param(
            "embedding", _normal(0.02, "vocab", "embed"), (c.vocab_size, c.dim)
        )
        x = look_up(embedding_VD.astype(c.dtype), token_BL)
        x, _ = nn.scan(
            self._block(),
            variable_axes={"params": 0, "cache": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.cache_len, name="layers")(x, position_BL)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        if c.tie_embeddings:
            head_DV = embedding_VD.T
        else:
            head_DV = self.param("head", _normal(0.02, "embed", "vocab"), (c.dim, c.vocab_size))
        head_DV = head_DV.astype(c.dtype)
        if target_BL is None:
            return logits(x, head_DV)
        return token_losses(x, head_DV, target_BL, chunk=c.loss_chunk)

    def _block(self) -> Any:
        policies = jax.checkpoint_policies
        policy = None
        if self.cfg.remat == "dots":
            policy = policies.save_only_these_names(*SAVED_DOTS)
        block = Block
        if self.gather is not None:

            def whole(variables: Any) -> Any:
                return {"params": self.gather(variables["params"])}

            block = nn.map_variables(Block, "params", trans_in_fn=whole)
            if self.cfg.remat == "none":
                # Kept for the backward pass, the gathered layers would add up to a whole model.
                policy = _save_all_but_gathered
        if self.cfg.remat == "none" and self.gather is None:
            return block
        return nn.remat(block, policy=policy, prevent_cse=False)


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # A name given to the result would not do: what it is computed from would be saved instead.
    return primitive.name not in ("sharding_constraint", "custom_vjp_call")


def llama_flops(cfg: LlamaConfig, *, seq_len: int) -> float:
    """FLOPs of one window, forward and backward: 6 per matmul parameter and token, and attention.

    Counts two operations per multiply-add, backward twice the forward, causal attention at half
    of its full square; norms, embeddings look-ups and the softmax are left out (as in the
    appendix of PaLM, Chowdhery et al. 2022).
    """
    attention = cfg.dim * cfg.head_dim * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    matmuls = cfg.num_layers * (attention + 3 * cfg.dim * cfg.hidden_dim)
    matmuls += cfg.dim * cfg.vocab_size
    scores = cfg.num_layers * cfg.num_heads * cfg.head_dim * seq_len
    return 6.0 * seq_len * (matmuls + scores)


def logical_axes(cfg: LlamaConfig) -> Any:
    """Tree of tuples of logical axis names, one per dimension, as the parameters are nested."""
    boxed = jax.eval_shape(
        lambda key: Llama(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"],
        jax.random.key(0),
    )
    return nn.get_partition_spec(boxed)
