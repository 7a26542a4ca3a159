"""The format "soup_jax": params.safetensors, tokenizer.json and recipe.json.

Leaves of the parameters are named by their paths, joined by "/"; nothing but safetensors and JSON
is needed to read them.
"""

import pathlib
import shutil

import numpy as np
from safetensors.numpy import save_file

from soup_jax import inputs, tree
from soup_jax import storage as files
from soup_jax.specialists.export import Exportable


def write(specialist: Exportable, folder: pathlib.Path) -> None:
    """Write the three files; the recipe comes last, with hashes of the others."""
    params, tokenizer = folder / "params.safetensors", folder / "tokenizer.json"
    leaves = {k: np.ascontiguousarray(v) for k, v in tree.flatten(specialist.params).items()}
    save_file(leaves, params)
    shutil.copyfile(specialist.tokenizer_path, tokenizer)
    hashes = {
        **specialist.recipe["hashes"],
        "tokenizer": inputs.sha256_file(tokenizer),
        "params": inputs.sha256_file(params),
    }
    recipe = files.sealed({**specialist.recipe, "hashes": hashes})
    files.write_json(folder / "recipe.json", recipe)
