"""The format "gguf": model.gguf for llama.cpp and what is built on it, and recipe.json.

llama.cpp rotates neighbouring numbers of a head, not its halves, so the rows of query and key are
reordered, as its own converter does. Tokens come from a byte-level BPE that cuts words like GPT-2.
"""

import logging
import pathlib
from typing import Any

import numpy as np

from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.inputs import read_json
from soup_jax.specialists.export import Exportable
from soup_jax.specialists.export.llama import Llama, llama_of, write_recipe

_log = logging.getLogger(__name__)
_PRE_TOKENIZER = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def write(specialist: Exportable, folder: pathlib.Path, *, dtype: str = "float32") -> None:
    """Write the two files.

    Args:
      dtype: float32, bfloat16 or float16, of the matrices; norms are float32 always.

    Raises:
      UserError: a network that is no Llama, a tokenizer that llama.cpp has under another name,
        numbers that the type does not hold, no room, or the package gguf is not installed.
    """
    model = llama_of(specialist, format="gguf", dtype=dtype)
    tokenizer = _tokenizer(specialist.tokenizer_path)
    try:
        import gguf
    except ImportError as e:
        raise UserError(
            "the format 'gguf' needs the package gguf: pip install 'soup_jax[gguf]'"
        ) from e
    size = sum(x.size for x in model.leaves.values()) * (4 if dtype == "float32" else 2)
    files.check_room(folder, size, f"the export to {folder.parent}")
    writer = gguf.GGUFWriter(folder / "model.gguf", "llama")
    _add_settings(writer, gguf, specialist, model)
    _add_tokens(writer, gguf, tokenizer, model)
    _add_tensors(writer, gguf, model)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    write_recipe(specialist, folder, format="gguf", dtype=dtype, names=["model.gguf"])
    _log.info("not checked against llama.cpp")


def _tokenizer(path: pathlib.Path) -> dict[str, Any]:
    found: dict[str, Any] = read_json(path)
    pre = {name: (found.get("pre_tokenizer") or {}).get(name) for name in _PRE_TOKENIZER}
    model = found["model"]
    plain = model.get("type") == "BPE" and not model.get("byte_fallback")
    if pre != _PRE_TOKENIZER or found.get("normalizer") or not plain:
        raise UserError(
            f"the tokenizer {path} is no byte-level BPE that cuts words like GPT-2, the one kind "
            "that the format 'gguf' writes: export as 'hf', and convert that with "
            "convert_hf_to_gguf.py of llama.cpp"
        )
    return found


def _add_settings(writer: Any, gguf: Any, specialist: Exportable, model: Llama) -> None:
    s, recipe = model.settings, specialist.recipe
    writer.add_type("model")
    writer.add_name(str(recipe.get("name") or "specialist"))
    writer.add_description(
        f"Specialist of a soup of experts at step {recipe.get('step')}, made by soup_jax"
    )
    writer.add_vocab_size(s.vocab_size)
    writer.add_context_length(s.seq_len)
    writer.add_embedding_length(s.dim)
    writer.add_block_count(s.num_layers)
    writer.add_feed_forward_length(s.hidden_dim)
    writer.add_head_count(s.num_heads)
    writer.add_head_count_kv(s.num_kv_heads)
    writer.add_layer_norm_rms_eps(s.norm_eps)
    writer.add_rope_freq_base(s.rope_theta)
    writer.add_rope_dimension_count(s.dim // s.num_heads)
    kinds = gguf.LlamaFileType
    kind = {
        "float32": kinds.ALL_F32,
        "float16": kinds.MOSTLY_F16,
        "bfloat16": kinds.MOSTLY_BF16,
    }
    writer.add_file_type(kind[model.dtype])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_tokens(writer: Any, gguf: Any, tokenizer: dict[str, Any], model: Llama) -> None:
    types, size = gguf.TokenType, model.settings.vocab_size
    # Ids that no token has still have a row of the embedding.
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [types.UNUSED] * size
    for token, i in tokenizer["model"]["vocab"].items():
        tokens[i], kinds[i] = token, types.NORMAL
    for added in tokenizer.get("added_tokens", ()):
        kind = types.CONTROL if added["special"] else types.USER_DEFINED
        tokens[added["id"]], kinds[added["id"]] = added["content"], kind
    kinds[model.eos_id] = types.CONTROL
    merges = tokenizer["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    # Older tokenizer.json have "a b", newer ["a", "b"]; a byte-level token has no space.
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    # A text begins with it, too: training windows start after one.
    writer.add_bos_token_id(model.eos_id)
    writer.add_eos_token_id(model.eos_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)


def _add_tensors(writer: Any, gguf: Any, model: Llama) -> None:
    s = model.settings
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, s.num_layers)
    heads = {"layers/attention/query": s.num_heads, "layers/attention/key": s.num_kv_heads}
    kinds = gguf.GGMLQuantizationType
    for tensor in model.tensors():
        x = model.rounded(tensor)
        raw = None
        if x.ndim == 1:
            x = x.astype(np.float32)
        if tensor.leaf in heads:
            x = _neighbours(x, heads[tensor.leaf])
        if x.dtype == "bfloat16":
            x, raw = x.view(np.uint8), kinds.BF16
        name = names.get_name(tensor.name, try_suffixes=(".weight",))
        writer.add_tensor(name, np.ascontiguousarray(x), raw_dtype=raw)


def _neighbours(x: np.ndarray, num_heads: int) -> np.ndarray:
    # Rows [heads, half of the head, place in it] -> [heads, place, half].
    halves = x.reshape(num_heads, 2, -1, x.shape[-1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(x.shape)
