"""The shipped network: a Llama-style decoder in Flax Linen.

It has RMSNorm, rotary positions, SwiGLU, optional grouped-query attention and tied embeddings, and
scans its layers (parameters stacked on a leading N). It knows nothing of soups. Its weights follow
the layout `x @ w`; the rotary embedding rotates the two halves of a head, as Hugging Face's
`LlamaForCausalLM` does.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.nn.initializers import normal, ones

from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel, ModelSettings, Rows, num_target_mask
from soup_jax.models.ops import (
    attend,
    attend_cached,
    document_begins,
    logits,
    look_up,
    matmul,
    token_losses,
)
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
    attention_reset: int = -1
    loss_chunk: int = 0

    @property
    def head_dim(self) -> int:
        """Size of one attention head."""
        return self.dim // self.num_heads

    def branch_std(self, fan_in: int) -> float:
        """Of the init of matrices [fan_in, D] that write to the residual stream.

        What all of them add is at first no larger than an embedding, whose numbers have std D^-0.5.
        Larger, they drown the token in the stream (docs/measured.md#init).
        """
        return (fan_in * self.dim * 2 * self.num_layers) ** -0.5


def llama_config(settings: ModelSettings) -> LlamaConfig:
    """The decoder of a network's settings.

    Raises:
      UserError: sizes that do not fit each other, or `args`, of which it has none.
    """
    s = settings

    def need(condition: bool, message: str) -> None:
        if not condition:
            raise UserError(f"config: {message}")

    for small, large in (("num_heads", "dim"), ("num_kv_heads", "num_heads")):
        of, whole = getattr(s, small), getattr(s, large)
        need(whole % of == 0, f"model.{small} = {of} must divide model.{large} = {whole}")
    need(s.dim // s.num_heads % 2 == 0, "model.dim / model.num_heads must be even")
    need(
        not s.loss_chunk or s.seq_len % s.loss_chunk == 0,
        f"model.loss_chunk = {s.loss_chunk} must divide seq_len = {s.seq_len}",
    )
    need(
        s.attention_reset < s.vocab_size,
        f"model.attention_reset = {s.attention_reset} is no token: vocab_size is {s.vocab_size}",
    )
    need(not s.args, f"model.args = {s.args} is for a network of your own; 'llama' reads none")
    return LlamaConfig(**{f.name: getattr(s, f.name) for f in dataclasses.fields(LlamaConfig)})


class RMSNorm(nn.Module):
    """x / rms(x) * scale, computed in float32."""

    eps: float

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., D] -> [..., D]."""
        scale_D = self.param("scale", ones, (x.shape[-1],))
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
    def __call__(self, x: Array, position_BL: Array, begin_BL: Array | None) -> Array:
        """[B, L, D], positions and the first of those seen [B, L] -> [B, L, D]."""
        c = self.cfg
        std = c.dim**-0.5
        heads = {"query": c.num_heads, "key": c.num_kv_heads, "value": c.num_kv_heads}
        projected = {}
        for name, num_heads in heads.items():
            w = self.param(name, normal(std), (c.dim, num_heads * c.head_dim))
            y = checkpoint_name(matmul(x, w.astype(x.dtype)), "projected")
            projected[name] = y.reshape(*x.shape[:2], num_heads, c.head_dim)
        query = rotate(projected["query"], position_BL, c.rope_theta)
        key = rotate(projected["key"], position_BL, c.rope_theta)
        value = projected["value"]
        if self.cache_len:
            y = self._cached(query, key, value, position_BL, begin_BL)
        else:
            y = attend(query, key, value, begin_BL, kind=c.attention)
        out = self.param("out", normal(c.branch_std(c.dim)), (c.dim, c.dim))
        y = checkpoint_name(y.reshape(*x.shape), "attended")
        return checkpoint_name(matmul(y, out.astype(x.dtype)), "attention_out")

    def _cached(
        self,
        query: Array,
        key: Array,
        value: Array,
        position_BL: Array,
        begin_BL: Array | None,
    ) -> Array:
        # By row and head, positions last but one: a step's sums read each head's keys in one run.
        rows, _, num_heads, size = key.shape
        shape = (rows, num_heads, self.cache_len, size)
        cached_key = self.variable("cache", "key", jnp.zeros, shape, key.dtype)
        cached_value = self.variable("cache", "value", jnp.zeros, shape, value.dtype)
        # Said so, a CPU writes these places and copies nothing else of the cache.
        row, head = jnp.arange(rows)[:, None, None], jnp.arange(num_heads)[None, :, None]
        place = (row, head, position_BL[:, None, :])
        for cached, new in ((cached_key, key), (cached_value, value)):
            cached.value = cached.value.at[place].set(
                new.swapaxes(1, 2), mode="drop", unique_indices=True, indices_are_sorted=True
            )
        groups = (1, query.shape[2] // num_heads)
        place_S = jnp.arange(self.cache_len)
        visible_BTS = place_S <= jnp.tile(position_BL, groups)[:, :, None]
        if begin_BL is not None:
            visible_BTS &= place_S >= jnp.tile(begin_BL, groups)[:, :, None]
        return attend_cached(query, cached_key.value, cached_value.value, visible_BTS)


class Mlp(nn.Module):
    """SwiGLU."""

    cfg: LlamaConfig

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, L, D] -> [B, L, D]."""
        c = self.cfg
        std = c.dim**-0.5
        shape = (c.dim, c.hidden_dim)
        gate_DF = self.param("gate", normal(std), shape).astype(x.dtype)
        up_DF = self.param("up", normal(std), shape).astype(x.dtype)
        down_FD = self.param("down", normal(c.branch_std(c.hidden_dim)), shape[::-1])
        gate = checkpoint_name(matmul(x, gate_DF), "mlp_hidden")
        up = checkpoint_name(matmul(x, up_DF), "mlp_hidden")
        return matmul(nn.silu(gate) * up, down_FD.astype(x.dtype))


class Block(nn.Module):
    """One layer: attention and MLP, each behind a norm and a residual connection."""

    cfg: LlamaConfig
    cache_len: int = 0

    @nn.compact
    def __call__(self, x: Array, position_BL: Array, begin_BL: Array | None) -> tuple[Array, None]:
        """[B, L, D] -> [B, L, D], in the form that `nn.scan` wants."""
        eps = self.cfg.norm_eps
        x = x + Attention(self.cfg, self.cache_len, name="attention")(
            RMSNorm(eps, name="attention_norm")(x), position_BL, begin_BL
        )
        return x + Mlp(self.cfg, name="mlp")(RMSNorm(eps, name="mlp_norm")(x)), None


class Llama(nn.Module):
    """Tokens to logits; `gather` gets a layer's parameters where they are used."""

    cfg: LlamaConfig
    gather: Callable[[Params], Params] | None = None

    @nn.compact
    def __call__(self, token_BL: Array, *, target_BL: Array | None = None) -> Array:
        """Logits, or the losses of given targets.

        Args:
          token_BL: int32.
          target_BL: int32. Given, the logits are never all held at once (see `token_losses`).

        Returns:
          float32 logits [B, L, V], or with targets cross-entropies in nats [B, L].
        """
        c = self.cfg
        position_BL = jnp.broadcast_to(jnp.arange(token_BL.shape[1]), token_BL.shape)
        begin_BL = None
        if c.attention_reset >= 0:
            begin_BL = document_begins(token_BL, position_BL, c.attention_reset)
        embedding_VD = self.param("embedding", normal(c.dim**-0.5), (c.vocab_size, c.dim))
        x = look_up(embedding_VD.astype(c.dtype), token_BL)
        x, _ = nn.scan(
            self._block(),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=nn.broadcast,
            length=c.num_layers,
        )(c, name="layers")(x, position_BL, begin_BL)
        x = RMSNorm(c.norm_eps, name="final_norm")(x)
        if c.tie_embeddings:
            head_DV = embedding_VD.T
        else:
            head_DV = self.param("head", normal(0.02), (c.dim, c.vocab_size))
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
        if (gather := self.gather) is not None:

            def whole(variables: Any) -> Any:
                return {"params": gather(variables["params"])}

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


def _by_layer(cfg: LlamaConfig, params: Params) -> Params:
    layers = params["layers"]
    cut = [jax.tree.map(lambda x: x[n], layers) for n in range(cfg.num_layers)]  # noqa: B023

    # Matrices in the type that they are used in; scales of norms stay as they are.
    def cast(x: Array) -> Array:
        return x.astype(cfg.dtype) if x.ndim > 1 else x

    return jax.tree.map(cast, {**params, "layers": cut})


def _decode(
    cfg: LlamaConfig,
    params: Params,
    token_BL: Array,
    position_B: Array,
    cache: list[Any] | None,
    *,
    cache_len: int,
) -> tuple[Array, list[Any]]:
    # `BaseModel.decode`. Layer by layer and not scanned: a scan copies each layer's weights and
    # cache before it uses them, which here is most of what a step would do.
    x: Any = look_up(params["embedding"].astype(cfg.dtype), token_BL)
    position_BL = position_B[:, None] + jnp.arange(token_BL.shape[1])
    begin_BL, resets = None, []
    if cfg.attention_reset >= 0:
        # The last of a row's cache says which places hold that token. Of a padded prompt it holds
        # the padding too, which is behind each position until a token overwrites it.
        reset_BS = jnp.zeros((len(token_BL), cache_len), bool) if cache is None else cache[-1]
        row = jnp.arange(len(token_BL))[:, None]
        is_reset_BL = token_BL == cfg.attention_reset
        reset_BS = reset_BS.at[row, position_BL].set(is_reset_BL, mode="drop")
        place_S = jnp.arange(cache_len)
        seen_BLS = reset_BS[:, None] & (place_S <= position_BL[..., None])
        begin_BL = jnp.where(seen_BLS, place_S, 0).max(axis=-1)
        resets = [reset_BS]
    block, caches = Block(cfg, cache_len), []
    for n in range(cfg.num_layers):
        variables = {"params": params["layers"][n]}
        if cache is not None:
            variables["cache"] = cache[n]
        found: Any = block.apply(variables, x, position_BL, begin_BL, mutable="cache")
        x = found[0][0]
        caches.append(found[1]["cache"])
    x = RMSNorm(cfg.norm_eps).apply({"params": params["final_norm"]}, x)
    head_DV = params["embedding"].T if cfg.tie_embeddings else params["head"]
    return logits(x, head_DV.astype(cfg.dtype)), caches + resets


@functools.cache
def _decoding(cfg: LlamaConfig) -> tuple[Any, Any]:
    # The same functions for networks of one config: what is compiled for one serves the others.
    return functools.partial(_decode, cfg), functools.partial(_by_layer, cfg)


def base_model(
    cfg: LlamaConfig, *, seq_len: int, gather: Callable[[Params], Params] | None = None
) -> BaseModel:
    """The decoder as a BaseModel; `seq_len` is that of the windows it is trained on."""
    module = Llama(cfg, gather=gather)

    def init(key: Array) -> Params:
        return Llama(cfg).init(key, jnp.zeros((1, 2), jnp.int32))["params"]

    def example_losses(params: Params, rows: Rows) -> tuple[Array, Array]:
        tokens = rows["tokens"]
        losses: Any = module.apply({"params": params}, tokens[:, :-1], target_BL=tokens[:, 1:])
        return losses, num_target_mask(rows["num_targets"], tokens.shape[1] - 1)

    def logits(params: Params, token_BL: Array) -> Array:
        found: Any = module.apply({"params": params}, token_BL)
        return found

    decode, decode_params = _decoding(cfg)
    return BaseModel(
        init,
        example_losses,
        logits=logits,
        decode=decode,
        decode_params=decode_params,
        flops_per_row=llama_flops(cfg, seq_len=seq_len),
        layers="layers/",
        row_products="layers/(attention|mlp)/.*",
        with_gather=lambda function: base_model(cfg, seq_len=seq_len, gather=function),
    )


def make(settings: ModelSettings) -> BaseModel:
    """The base network of `model.kind` = "llama".

    Raises:
      UserError: as `llama_config` says.
    """
    return base_model(llama_config(settings), seq_len=settings.seq_len)
