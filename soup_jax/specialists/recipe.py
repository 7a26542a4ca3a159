"""The recipe of a specialist: what it is, and what reproduces it. In its folder, recipe.json."""

import pathlib
from collections.abc import Mapping
from typing import Any

from soup_jax import inputs
from soup_jax.config import schema as config_lib
from soup_jax.errors import UserError
from soup_jax.models.base import ModelSettings

FORMAT = 1  # the format that is written, and the newest that is read
_RECIPE = {
    "alpha": [float],
    "eos_id": int,
    "exported?": {"format": str, "dtype": str, "files": {...: str}},
    "h": [float],
    "hashes": {...: str},
    "model": dict,
    "seq_len": int,
    "vocab_size": int,
}


def read(folder: pathlib.Path) -> dict[str, Any]:
    """The recipe of a specialist's folder; the files that it describes are compared by hash.

    Its `model` has today's fields, whichever version wrote it.

    Raises:
      UserError: not such a folder, an export to another library, of a newer format, incomplete, or
        changed since it was written.
    """
    recipe = read_any(folder)
    if "exported" in recipe:
        raise UserError(
            f"{folder} is an export in the format {recipe['exported']['format']!r}, for other "
            "libraries: give the folder that `soup-jax instantiate` wrote"
        )
    return recipe


def read_any(folder: pathlib.Path) -> dict[str, Any]:
    """`read`, of exports too."""
    path = folder / "recipe.json"
    if not path.exists():
        raise UserError(
            f"{folder} is not a specialist: {path} does not exist (see `soup-jax instantiate`)"
        )
    recipe = inputs.read_json(path)
    inputs.read_format(recipe, path, newest=FORMAT)
    inputs.check_structure(recipe, _RECIPE, path)
    inputs.check_seal(recipe, path)
    h, eos_id = recipe["h"], recipe["eos_id"]
    for good, what in (
        (recipe["seq_len"] > 0, f"seq_len = {recipe['seq_len']}"),
        (0 <= eos_id < recipe["vocab_size"], f"eos_id = {eos_id}"),
        (min(h, default=-1) >= 0 and abs(sum(h) - 1) < 1e-3, "h, which must add up to 1"),
    ):
        if not good:
            raise UserError(f"{path} is damaged: it cannot be that {what}. Make it again")
    described = {
        name: recipe["hashes"].get(name.split(".")[0])
        for name in ("params.safetensors", "tokenizer.json")
    }
    for file, expected in recipe.get("exported", {"files": described})["files"].items():
        written = folder / file
        if not written.exists() or inputs.sha256_file(written) != expected:
            raise UserError(
                f"{written} is missing or not what its recipe.json describes; make it again"
            )
    return {**recipe, "model": config_lib.restore_section("model", recipe["model"], where=path)}


def settings(recipe: Mapping[str, Any]) -> ModelSettings:
    """What its network is made from.

    Raises:
      UserError: fields that this version does not know, or some that are missing.
    """
    return ModelSettings.from_mapping(
        recipe["model"], vocab_size=recipe["vocab_size"], seq_len=recipe["seq_len"]
    )
