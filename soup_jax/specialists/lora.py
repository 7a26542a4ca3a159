"""The format "lora": a PEFT adapter that turns a run's shared parameters into a specialist.

    adapter_config.json, adapter_model.safetensors, recipe.json

With low-rank experts alone Theta = S + [alpha_1 U_1, ..., alpha_E U_E] [V_1; ...; V_E] on each
matrix: an adapter of rank E r on the model S, which `soup-jax export --run=RUN` writes. A
specialist has the sum only, so the factors are read from its run.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from soup_jax import storage as files
from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.specialists.export import Exportable
from soup_jax.specialists.export.llama import Llama, llama_of, write_recipe
from soup_jax.specialists.open import load

# A specialist's leaves equal those of its run but for sums in another order.
_TOLERANCE = 1e-5
Factors = dict[str, tuple[np.ndarray, np.ndarray]]  # by leaf: [..., a, E r] and [..., E r, b]


def write(
    specialist: Exportable,
    folder: pathlib.Path,
    *,
    dtype: str = "float32",
    run: str = "",
    corpus: str = "",
    base: str = "",
) -> None:
    """Write the three files.

    Args:
      dtype: float32, bfloat16 or float16, of the factors.
      run: its run, if it was moved; the checkpoint of its step must be there.
      corpus: the run's corpus, if it was moved.
      base: folder or name of the exported shared parameters, which adapter_config.json names.

    Raises:
      UserError: a network that is no Llama, experts that are not of low rank or of a leaf that
        has no adapter, a run that is gone or another one.
    """
    model = llama_of(specialist, format="lora", dtype=dtype)
    recipe = specialist.recipe
    place = run or recipe["run"]
    soup = load(place, step=recipe["step"], corpus_dir=corpus)
    params = jax.device_get(soup.params)
    factors = factors_of(params["bank"], np.asarray(recipe["alpha"], np.float32))
    shared = tree.flatten(params["shared"])
    for path, leaf in model.leaves.items():
        merged = shared[path] + (np.matmul(*factors[path]) if path in factors else 0)
        if not np.allclose(merged, leaf, rtol=0, atol=_TOLERANCE * max(1, np.abs(leaf).max())):
            raise UserError(
                f"the specialist is none of {place} at step {recipe['step']}: {path} differs; give "
                "its run with --run=RUN"
            )
    tensors, config = adapter(model, factors)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    files.write_json(
        folder / "adapter_config.json", {**config, "base_model_name_or_path": base or None}
    )
    names = ["adapter_model.safetensors", "adapter_config.json"]
    write_recipe(specialist, folder, format="lora", dtype=dtype, names=names)


def factors_of(bank: Mapping[str, Any], alpha_E: np.ndarray) -> Factors:
    """The factors of all experts side by side, coefficients in the left one.

    Raises:
      UserError: no experts, or some that are not of low rank.
    """
    if set(bank) != {"low_rank"}:
        raise UserError(
            "the format 'lora' takes experts of low rank only (experts.rules 'low_rank:R' and "
            f"'none'), and this soup's are {' and '.join(sorted(bank)) or 'none'}: export as 'hf'"
        )
    stacks = tree.flatten(bank["low_rank"])
    factors = {}
    for path in {p.rpartition("/")[0] for p in stacks}:
        left, right = (stacks[f"{path}/{side}"].astype(np.float32) for side in ("left", "right"))
        left = left * alpha_E.reshape(-1, *[1] * (left.ndim - 1))
        factors[path] = np.concatenate(list(left), -1), np.concatenate(list(right), -2)
    return factors


def adapter(model: Llama, factors: Factors) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, adapter_config.json) of a PEFT adapter with these factors.

    Raises:
      UserError: experts of the embedding, which PEFT adapts in another way.
    """
    if "embedding" in factors:
        raise UserError(
            "the format 'lora' adapts linear layers, and this soup has experts of the leaf "
            "'embedding': export as 'hf'"
        )
    tensors, ranks = {}, {}
    for tensor in model.tensors():
        if tensor.leaf in factors:
            left, right = factors[tensor.leaf]
            at = slice(None) if tensor.layer is None else tensor.layer
            module = tensor.name.removesuffix(".weight")
            # There a layer adds B A x, and its matrices are transposed.
            for name, x in (("lora_A", left[at].T), ("lora_B", right[at].T)):
                key = f"base_model.model.{module}.{name}.weight"
                tensors[key] = np.ascontiguousarray(x.astype(model.dtype))
            ranks[module.rpartition(".")[2]] = left.shape[-1]
    most = max(ranks.values())
    other = {name: rank for name, rank in ranks.items() if rank != most}
    return tensors, {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": most,
        "lora_alpha": most,  # the product counts lora_alpha / r times
        "rank_pattern": other,
        "alpha_pattern": other,
        "target_modules": sorted(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
