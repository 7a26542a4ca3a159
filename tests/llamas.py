"""Small specialists of the shipped network without a run, and a Llama in NumPy to check them."""

import pathlib

import jax
import numpy as np

from soup_jax.data.tokenizer import train_tokenizer
from soup_jax.models import base as models
from soup_jax.models.base import ModelSettings
from soup_jax.specialists.specialist import Specialist

MODEL = {
    "kind": "llama",
    "num_layers": 2,
    "dim": 32,
    "num_heads": 4,
    "num_kv_heads": 2,
    "hidden_dim": 48,
    "tie_embeddings": True,
    "rope_theta": 500.0,
    "norm_eps": 1e-5,
}
KINDS = [
    {"tie_embeddings": tied, "num_kv_heads": heads} for tied in (True, False) for heads in (2, 4)
]
TEXTS = ("", "butter flour oven", " naïve 🍞 日本語\n\n\tx = 12345", "<|endoftext|> is text")
SIZES = {"vocab_size": 300, "seq_len": 48}


def specialist(folder: pathlib.Path, *, sizes=SIZES, **fields) -> Specialist:
    """A specialist with random parameters, norms included; `fields` of its model."""
    section = MODEL | fields
    settings = ModelSettings.from_mapping(section, **sizes)
    model = models.make("llama", settings)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda x: rng.normal(0.1, 0.2, x.shape).astype("f"),
        jax.eval_shape(model.init, jax.random.key(0)),
    )
    folder.mkdir(parents=True, exist_ok=True)
    # A few ids less than the network has.
    words = ["butter flour oven bake sugar dough", "naïve x = 12345 <|endoftext|>"]
    train_tokenizer(words, 290).save(folder / "tokenizer.json")
    return Specialist(
        params=params,
        model=model,
        recipe={
            "format": 1,
            "run": "/runs/cakes",
            "name": "cakes",
            "step": 12,
            "h": [0.25, 0.75],
            "alpha": [0.5],
            "domains": ["sailing", "cooking"],
            "num_documents": 30,
            "model": section,
            **sizes,
            "eos_id": 0,
            "hashes": {"corpus": "c" * 64, "config": "d" * 64},
        },
        tokenizer_path=folder / "tokenizer.json",
    )


def numpy_logits(tensors, config, ids, *, neighbours=False) -> np.ndarray:
    """[L, V] of a LlamaForCausalLM, from its formulas.

    Args:
      tensors: by the names that transformers gives them.
      config: its config.json.
      neighbours: rotate neighbouring numbers of a head, as llama.cpp does, not its halves.
    """
    t = {name: np.asarray(x, np.float64) for name, x in tensors.items()}
    num_heads, num_kv = config["num_attention_heads"], config["num_key_value_heads"]
    size, length = config["hidden_size"] // num_heads, len(ids)

    def norm(x, name):
        rms = np.sqrt((x * x).mean(-1, keepdims=True) + config["rms_norm_eps"])
        return x / rms * t[f"{name}.weight"]

    def heads(x, name, num):
        return (x @ t[f"{name}.weight"].T).reshape(length, num, size).swapaxes(0, 1)

    def rotated(x):
        turns = config["rope_theta"] ** -(np.arange(size // 2) * 2 / size)
        turn = np.exp(1j * np.arange(length)[:, None] * turns)
        pair = (x[..., ::2], x[..., 1::2]) if neighbours else np.split(x, 2, axis=-1)
        z = (pair[0] + 1j * pair[1]) * turn
        if neighbours:
            return np.stack([z.real, z.imag], -1).reshape(x.shape)
        return np.concatenate([z.real, z.imag], -1)

    x = t["model.embed_tokens.weight"][list(ids)]
    for n in range(config["num_hidden_layers"]):
        at = f"model.layers.{n}."
        y = norm(x, at + "input_layernorm")
        query = rotated(heads(y, at + "self_attn.q_proj", num_heads))
        key = rotated(heads(y, at + "self_attn.k_proj", num_kv)).repeat(num_heads // num_kv, 0)
        value = heads(y, at + "self_attn.v_proj", num_kv).repeat(num_heads // num_kv, 0)
        scores = query @ key.swapaxes(1, 2) / np.sqrt(size)
        scores[:, np.triu(np.ones((length, length), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        mixed = (weights @ value).swapaxes(0, 1).reshape(length, -1)
        x = x + mixed @ t[at + "self_attn.o_proj.weight"].T
        y = norm(x, at + "post_attention_layernorm")
        gate = y @ t[at + "mlp.gate_proj.weight"].T
        up = y @ t[at + "mlp.up_proj.weight"].T
        x = x + (gate / (1 + np.exp(-gate)) * up) @ t[at + "mlp.down_proj.weight"].T
    head = t.get("lm_head.weight", t["model.embed_tokens.weight"])
    return norm(x, "model.norm") @ head.T
