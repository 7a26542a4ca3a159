"""The shared parameters of a new soup from a Llama of transformers: a folder of safetensors.

The folder is what `save_pretrained` writes, and `soup-jax export --format=hf`. Experts are made
around it as around parameters from the seed; with `experts.init_scale` = 0 they start at zero, so
at step 0 every specialist is the model of the folder.
"""

import contextlib
import logging
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import safetensors
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.config.schema import flat_items
from soup_jax.data.corpus import Corpus
from soup_jax.data.tokenizer import load_tokenizer
from soup_jax.errors import UserError
from soup_jax.inputs import open_file, read_json
from soup_jax.models import transformers_llama
from soup_jax.models.transformers_llama import Tensor
from soup_jax.shapes import Params

_log = logging.getLogger(__name__)
_FLOATS = ("F64", "F32", "F16", "BF16")


def is_pretrained(folder: pathlib.Path) -> bool:
    """Whether a folder's config.json is one of transformers, not of a run of ours."""
    config = read_json(folder / "config.json")
    return isinstance(config, dict) and not {"model_type", "architectures"}.isdisjoint(config)


def read(folder: pathlib.Path, cfg: ConfigDict, abstract: Params, corpus: Corpus) -> Params:
    """The shared parameters, each process its part of them.

    Args:
      cfg: of the run.
      abstract: ShapeDtypeStructs with shardings of the shared parameters.
      corpus: of the run; a warning says so if its tokenizer is another than the folder's.

    Raises:
      UserError: a network that our decoder cannot be or the config does not describe, each
        difference with the flag to set; tensors that are missing, too many or of another shape.
    """
    _check_config(folder, cfg)
    leaves = tree.flatten(abstract)
    wanted: dict[str, list[Tensor]] = {}
    for t in transformers_llama.tensors(
        num_layers=cfg.model.num_layers, tied=cfg.model.tie_embeddings
    ):
        wanted.setdefault(t.leaf, []).append(t)
    if wanted.keys() != leaves.keys():
        raise UserError(
            f"checkpoint.init_from = {folder} is a Llama of transformers, and this run's network "
            "is not model.kind = 'llama'"
        )
    with contextlib.ExitStack() as stack:
        tensors = _open(folder, stack)
        _check_tensors(folder, tensors, wanted, leaves, tied=cfg.model.tie_embeddings)
        found = {path: _leaf(leaves[path], wanted[path], tensors.__getitem__) for path in leaves}
    warn(folder, cfg, corpus)
    return tree.unflatten(found)


def _check_config(folder: pathlib.Path, cfg: ConfigDict) -> None:
    path = folder / "config.json"
    theirs = transformers_llama.model_fields(read_json(path), str(path))
    names = {f: "vocab_size" if f == "vocab_size" else f"model.{f}" for f in theirs}
    ours = dict(flat_items(cfg))
    different = {names[f]: value for f, value in theirs.items() if ours[names[f]] != value}
    if different:
        lines = ", ".join(f"{name}: {ours[name]!r} -> {v!r}" for name, v in different.items())
        flags = " ".join(f"--config.{name}={value}" for name, value in different.items())
        raise UserError(
            f"checkpoint.init_from = {folder} has another network than the config "
            f"(config -> folder): {lines}. Set {flags}"
        )


def _open(folder: pathlib.Path, stack: contextlib.ExitStack) -> dict[str, Any]:
    # Slices of the tensors by name; nothing is read yet.
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.exists():
        found = read_json(index, {"weight_map": {...: str}})
        names = sorted({pathlib.PurePath(name).name for name in found["weight_map"].values()})
    elif not (folder / names[0]).exists():
        raise UserError(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json: let "
            "transformers write it, with model.save_pretrained(DIR)"
        )
    tensors: dict[str, Any] = {}
    for name in names:
        open_file(folder / name).close()
        try:
            file = stack.enter_context(safetensors.safe_open(folder / name, framework="np"))
            tensors |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, safetensors.SafetensorError) as e:
            raise UserError(f"cannot read {folder / name}: no safetensors file: {e}") from e
    return tensors


def _check_tensors(
    folder: pathlib.Path,
    tensors: Mapping[str, Any],
    wanted: Mapping[str, list[Tensor]],
    leaves: Mapping[str, Any],
    *,
    tied: bool,
) -> None:
    problems = []
    names = {t.name for parts in wanted.values() for t in parts}
    if missing := sorted(names - tensors.keys()):
        problems.append(f"{', '.join(missing[:5])} missing")
    # Older versions saved the angles of the rotary positions, and some the head that is tied.
    more = {n for n in tensors.keys() - names if not n.endswith(".rotary_emb.inv_freq")}
    if unknown := sorted(more - ({"lm_head.weight"} if tied else set())):
        problems.append(f"{', '.join(unknown[:5])} in no network of ours")
    for path, parts in wanted.items():
        shape = leaves[path].shape[parts[0].layer is not None :]
        shape = list(shape if parts[0].plain else shape[::-1])
        for t in parts:
            x = tensors.get(t.name)
            if x is not None and (x.get_shape() != shape or x.get_dtype() not in _FLOATS):
                found = f"{x.get_dtype()}{x.get_shape()}"
                problems.append(f"{t.name} is {found}, expected floats of {shape}")
    if problems:
        raise UserError(f"the tensors of {folder} do not fit: {'; '.join(problems[:5])}")


def _leaf(leaf: Any, parts: list[Tensor], get: Callable[[str], Any]) -> jax.Array:
    def slice_of(t: Tensor, index: tuple[slice, ...]) -> np.ndarray:
        return t.layout(get(t.name)[index if t.plain else index[::-1]]).astype(leaf.dtype)

    def device_part(index: Any) -> np.ndarray:
        if parts[0].layer is None:
            return slice_of(parts[0], index)
        return np.stack([slice_of(t, index[1:]) for t in parts[index[0]]])

    return jax.make_array_from_callback(leaf.shape, leaf.sharding, device_part)


def warn(folder: pathlib.Path, cfg: ConfigDict, corpus: Corpus) -> None:
    """Say what makes parameters of a folder with a tokenizer.json another model here."""
    theirs = folder / "tokenizer.json"
    if theirs.exists() and not load_tokenizer(theirs).encodes_like(
        load_tokenizer(corpus.path / "tokenizer.json")
    ):
        _log.warning(
            "%s has another tokenizer than the corpus, so its parameters take tokens for others: "
            "prepare a corpus with --config.tokenizer.path=%s",
            folder,
            theirs,
        )
    if cfg.experts.init_scale and cfg.num_experts:
        _log.warning(
            "experts.init_scale = %g: specialists at step 0 are not the model of %s",
            cfg.experts.init_scale,
            folder,
        )
