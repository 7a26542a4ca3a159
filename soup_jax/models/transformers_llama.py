"""The decoder as `transformers` knows it: LlamaForCausalLM's tensors and config.json, both ways.

Both rotate the two halves of a head and group query heads in the same order, so a tensor there is a
leaf here: one layer of it, and transposed if it is a matrix, for a linear layer there holds
[out, in]. Only the embedding is [V, D] on both sides.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from soup_jax.errors import UserError
from soup_jax.models.base import ModelSettings

_EMBEDDING = {"embedding": "model.embed_tokens.weight"}
_LAYER = {
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/query": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/key": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/value": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/out": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down": "model.layers.{}.mlp.down_proj.weight",
}
_END = {"final_norm/scale": "model.norm.weight"}
_HEAD = {"head": "lm_head.weight"}
# Of config.json -> of a `model` section, and what transformers takes if config.json lacks it.
_FIELDS = {
    "vocab_size": ("vocab_size", None),
    "num_hidden_layers": ("num_layers", None),
    "hidden_size": ("dim", None),
    "num_attention_heads": ("num_heads", None),
    "intermediate_size": ("hidden_dim", None),
    "rms_norm_eps": ("norm_eps", 1e-6),
    "tie_word_embeddings": ("tie_embeddings", False),
}
_ROPE_THETA = 10_000.0


class Tensor(NamedTuple):
    """One tensor of transformers: its name, the leaf that it is, and which layer of it, if any."""

    name: str
    leaf: str
    layer: int | None = None

    @property
    def plain(self) -> bool:
        """Whether both sides have the same layout; else one is the other's transpose."""
        return self.leaf == "embedding" or self.leaf.endswith("norm/scale")

    def layout(self, x: np.ndarray) -> np.ndarray:
        """A view of one side's array in the layout of the other."""
        return x if self.plain else x.T

    def of(self, leaves: Mapping[str, np.ndarray]) -> np.ndarray:
        """A view of the leaf in the layout of transformers."""
        x = leaves[self.leaf]
        return self.layout(x if self.layer is None else x[self.layer])


def tensors(*, num_layers: int, tied: bool) -> list[Tensor]:
    """All tensors of a model, those of a layer together; tied embeddings have no head."""
    head = {} if tied else _HEAD
    return [
        *(Tensor(name, leaf) for leaf, name in _EMBEDDING.items()),
        *(Tensor(t.format(n), leaf, n) for n in range(num_layers) for leaf, t in _LAYER.items()),
        *(Tensor(name, leaf) for leaf, name in {**_END, **head}.items()),
    ]


def config_json(settings: ModelSettings, *, eos_id: int, dtype: str) -> dict[str, Any]:
    """The config.json of a network; what transformers 5 renamed has both names.

    Args:
      eos_id: of the token that ends a text and, as training windows start after it, begins one.
      dtype: in which the tensors are stored, and are loaded.
    """
    s = settings
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": s.vocab_size,
        "hidden_size": s.dim,
        "intermediate_size": s.hidden_dim,
        "num_hidden_layers": s.num_layers,
        "num_attention_heads": s.num_heads,
        "num_key_value_heads": s.num_kv_heads,
        "head_dim": s.dim // s.num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": s.seq_len,
        "rms_norm_eps": s.norm_eps,
        "rope_theta": s.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": s.rope_theta},
        "tie_word_embeddings": s.tie_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "torch_dtype": dtype,
        "dtype": dtype,
    }


def model_fields(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`vocab_size` and the fields of a `model` section that a config.json describes.

    Raises:
      UserError: another architecture, a size that is missing, or what our decoder does not have.
    """
    kind = config.get("model_type")
    if kind != "llama":
        raise UserError(
            f"{where} describes the architecture {kind!r}; soup_jax reads 'llama' "
            "(LlamaForCausalLM) of transformers"
        )
    rope = config.get("rope_parameters") or {}
    values: dict[str, Any] = {"kind": "llama"}
    try:
        for name, (field, default) in _FIELDS.items():
            values[field] = config[name] if default is None else config.get(name, default)
        values["num_kv_heads"] = config.get("num_key_value_heads") or values["num_heads"]
        theta = rope.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA
        values["rope_theta"] = float(theta)
        values["norm_eps"] = float(values["norm_eps"])
        _refuse(config, values, where)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as e:
        raise UserError(
            f"{where} is damaged, or no config.json of a Llama: {type(e).__name__} {e}"
        ) from e
    return values


def _refuse(config: Mapping[str, Any], values: Mapping[str, Any], where: str) -> None:
    rope = config.get("rope_scaling") or config.get("rope_parameters") or {}
    scaling = rope.get("rope_type") or rope.get("type") or "default"
    head_dim = config.get("head_dim")
    usual = values["dim"] // values["num_heads"]
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    problems = (
        (scaling != "default", f"scaled rotary positions (rope_type {scaling!r})"),
        (partial != 1, f"rotary positions on a part of a head (partial_rotary_factor {partial})"),
        (config.get("attention_bias"), "biases in attention (attention_bias)"),
        (config.get("mlp_bias"), "biases in the MLP (mlp_bias)"),
        (
            head_dim not in (None, usual),
            f"heads of another size (head_dim {head_dim}) than hidden_size / num_attention_heads "
            f"= {usual}",
        ),
        (
            config.get("hidden_act", "silu") not in ("silu", "swish"),
            f"another activation (hidden_act {config.get('hidden_act')!r}) than silu",
        ),
        (
            config.get("sliding_window"),
            f"a sliding window of attention (sliding_window {config.get('sliding_window')})",
        ),
        (config.get("quantization_config"), "quantised weights (quantization_config)"),
    )
    for there, what in problems:
        if there:
            raise UserError(f"{where} describes a Llama with {what}, which soup_jax does not have")
