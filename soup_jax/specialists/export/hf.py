"""The format "hf": a folder that transformers, vLLM and others load, a LlamaForCausalLM.

    config.json, generation_config.json, model.safetensors (or shards with an index),
    tokenizer.json, tokenizer_config.json, special_tokens_map.json, README.md, recipe.json

Its tokenizer puts the end-of-text token before every text, as `Specialist.generate` does: training
windows start after one. Where transformers and torch are installed, what was written is loaded with
them, and its logits are compared with ours.
"""

import logging
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import tokenizers
from safetensors.numpy import save_file
from tokenizers import processors

from soup_jax import storage as files
from soup_jax.data.tokenizer import load_tokenizer
from soup_jax.models import transformers_llama
from soup_jax.models.transformers_llama import Tensor
from soup_jax.specialists.export import Exportable, card, check_hf
from soup_jax.specialists.export.llama import Llama, llama_of, write_recipe

SHARD_BYTES = 5_000_000_000
_log = logging.getLogger(__name__)


def write(
    specialist: Exportable,
    folder: pathlib.Path,
    *,
    dtype: str = "float32",
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write the files and check them.

    Args:
      dtype: float32, bfloat16 or float16, of the tensors in the files.
      shard_bytes: a larger model is cut into files of at most this size, or one tensor.

    Raises:
      UserError: a network that is no Llama, a type that does not hold its numbers, no room, or
        transformers computes other logits than we do.
    """
    model = llama_of(specialist, format="hf", dtype=dtype)
    eos = _write_tokenizer(specialist, folder, model)
    names = _write_weights(model, folder, shard_bytes)
    config = transformers_llama.config_json(model.settings, eos_id=model.eos_id, dtype=dtype)
    files.write_json(folder / "config.json", config)
    # transformers wants an id that pads texts of a batch that have ended; it is never attended to.
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), model.eos_id)
    files.write_json(folder / "generation_config.json", special)
    files.write_text(folder / "README.md", card.text(specialist.recipe, model, eos=eos))
    names += ["config.json", "generation_config.json", "tokenizer.json"]
    names += ["tokenizer_config.json", "special_tokens_map.json"]
    write_recipe(specialist, folder, format="hf", dtype=dtype, names=names)
    _log.info("%s", check_hf.check(specialist, model, folder))


def _write_tokenizer(specialist: Exportable, folder: pathlib.Path, model: Llama) -> str:
    # Returns the end-of-text token.
    path = folder / "tokenizer.json"
    load_tokenizer(specialist.tokenizer_path).save(path)  # neither truncates nor pads
    inner = tokenizers.Tokenizer.from_file(str(path))
    eos: Any = inner.id_to_token(model.eos_id)
    inner.post_processor = processors.TemplateProcessing(
        single=[eos, "$A"], pair=[eos, "$A", eos, "$B"], special_tokens=[(eos, model.eos_id)]
    )
    files.write_text(path, inner.to_str(pretty=True))
    special = {"bos_token": eos, "eos_token": eos}
    settings: dict[str, Any] = {
        **special,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.settings.seq_len,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        # Its characters in a text are text, as for us.
        "split_special_tokens": True,
    }
    files.write_json(folder / "tokenizer_config.json", settings)
    files.write_json(folder / "special_tokens_map.json", special)
    return str(eos)


def _write_weights(model: Llama, folder: pathlib.Path, shard_bytes: int) -> list[str]:
    # Returns the names of the files.
    shards = list(_shards(model, shard_bytes))
    files.check_room(folder, sum(size for _, size in shards), f"the export to {folder.parent}")
    names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, (tensors, _) in zip(names, shards):
        # transformers asks for this format, whatever wrote the file.
        save_file({t.name: model.rounded(t) for t in tensors}, folder / name, {"format": "pt"})
        shutil.copymode(folder / "tokenizer.json", folder / name)  # safetensors': for the owner
    if len(shards) == 1:
        return names
    index = {
        "metadata": {"total_size": sum(size for _, size in shards)},
        "weight_map": {t.name: n for n, (tensors, _) in zip(names, shards) for t in tensors},
    }
    files.write_json(folder / "model.safetensors.index.json", index)
    return [*names, "model.safetensors.index.json"]


def _shards(model: Llama, shard_bytes: int) -> Iterator[tuple[list[Tensor], int]]:
    shard: list[Tensor] = []
    total = 0
    for tensor in model.tensors():
        size = tensor.of(model.leaves).size * (4 if model.dtype == "float32" else 2)
        if shard and total + size > shard_bytes:
            yield shard, total
            shard, total = [], 0
        shard.append(tensor)
        total += size
    yield shard, total
