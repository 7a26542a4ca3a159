"""Load an exported folder with transformers, and compare logits and token ids with ours."""

import dataclasses
import importlib.metadata
import importlib.util
import pathlib
from typing import Any

import jax
import numpy as np

from soup_jax import tree
from soup_jax.data.tokenizer import load_tokenizer
from soup_jax.errors import UserError
from soup_jax.models import base as models
from soup_jax.specialists.export import Exportable
from soup_jax.specialists.export.llama import Llama

# Of the largest logit, both sides in float32: sums in another order differ by about 1e-6 of it.
BOUND = 1e-4
_ROWS, _TOKENS = 4, 64
_TEXTS = ("", " Two words", "naïve 🍞\n\n  def f(x):\t1234567", "<|endoftext|></s> is text")


def check(specialist: Exportable, model: Llama, folder: pathlib.Path) -> str:
    """A line on what was compared, or why nothing was.

    Both compute in float32, from the parameters as they were rounded for the export.

    Raises:
      UserError: logits differ by more than BOUND times the largest, or token ids differ.
    """
    if reason := _why_not():
        return f"not checked against transformers: {reason} (pip install 'soup_jax[hf]')"
    import transformers

    version = f"transformers {transformers.__version__}"
    ours = load_tokenizer(specialist.tokenizer_path)
    theirs = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in _TEXTS:
        ids, their_ids = [model.eos_id, *ours.encode(text)], theirs(text)["input_ids"]
        if their_ids != ids:
            raise UserError(
                f"{version} reads this tokenizer in another way: {text!r} gives {their_ids}, and "
                f"{ids} here; nothing was written. This is a bug, please report it"
            )
    length = min(_TOKENS, model.settings.seq_len)
    rng = np.random.default_rng(0)
    rows = rng.integers(0, model.settings.vocab_size, (_ROWS, length))
    rows[:, 0] = model.eos_id
    expected = _our_logits(model, rows)
    network = transformers.AutoModelForCausalLM.from_pretrained(
        folder, local_files_only=True, dtype="float32"
    )
    tensors = transformers.BatchEncoding({"input_ids": rows}, tensor_type="pt")
    found = network(**tensors).logits.detach().numpy()
    worst, largest = float(np.abs(found - expected).max()), float(np.abs(expected).max())
    if not worst <= BOUND * max(largest, 1.0):
        raise UserError(
            f"{version} computes other logits than soup_jax: they differ by up to {worst:.2g}, and "
            f"the largest is {largest:.3g}; nothing was written. This is a bug, please report it"
        )
    return (
        f"checked with {version}: logits of {_ROWS} rows of {length} tokens differ by at most "
        f"{worst:.1e} (largest {largest:.3g}; bound {BOUND} of it), token ids not at all"
    )


def _why_not() -> str:
    for name, oldest in (("torch", ""), ("transformers", "4.57")):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
        found = importlib.metadata.version(name)
        if oldest and _numbers(found) < _numbers(oldest):
            return f"{name} is {found}, older than {oldest}"
    try:
        importlib.import_module("transformers")
    except Exception as e:  # a broken installation of others must not stop an export
        return f"transformers cannot be imported: {type(e).__name__}: {e}"
    return ""


def _numbers(version: str) -> list[int]:
    return [int(part) for part in version.split(".")[:2]]


def _our_logits(model: Llama, rows: np.ndarray) -> np.ndarray:
    plain = dataclasses.replace(model.settings, dtype="float32", attention="xla", remat="none")
    network = models.make("llama", plain)
    assert network.logits is not None
    leaves = {p: x.astype(model.dtype).astype(np.float32) for p, x in model.leaves.items()}
    compute: Any = jax.jit(network.logits)
    with jax.default_matmul_precision("highest"):
        return np.asarray(compute(tree.unflatten(leaves), rows.astype(np.int32)))
