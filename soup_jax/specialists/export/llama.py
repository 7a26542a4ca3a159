"""What the formats of other libraries share: which network they take, its tensors, the recipe."""

import pathlib
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from soup_jax import inputs, tree
from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.models.base import ModelSettings
from soup_jax.models.transformers_llama import Tensor, tensors
from soup_jax.specialists.export import Exportable

DTYPES = ("float32", "bfloat16", "float16")


class Llama(NamedTuple):
    """A specialist whose network is the shipped decoder.

    Attributes:
      settings: of its network.
      leaves: its parameters by path.
      dtype: in which they are exported.
      eos_id: of the token that ends a text and begins one.
    """

    settings: ModelSettings
    leaves: dict[str, np.ndarray]
    dtype: str
    eos_id: int

    def tensors(self) -> list[Tensor]:
        """Names as in transformers, and the leaves that they are."""
        s = self.settings
        return tensors(num_layers=s.num_layers, tied=s.tie_embeddings)

    def rounded(self, tensor: Tensor) -> np.ndarray:
        """A tensor in the layout of transformers, as it is exported.

        Raises:
          UserError: it has numbers that the type cannot hold.
        """
        x = tensor.of(self.leaves)
        with np.errstate(over="ignore"):
            x = np.ascontiguousarray(x.astype(self.dtype))
        if not np.isfinite(x.astype(np.float32)).all():
            raise UserError(
                f"{tensor.leaf} has numbers that {self.dtype} cannot hold: take --dtype=bfloat16"
            )
        return x


def llama_of(specialist: Exportable, *, format: str, dtype: str) -> Llama:
    """The specialist as a format of other libraries takes it.

    Raises:
      UserError: a network that is not the shipped decoder, or no such dtype.
    """
    if dtype not in DTYPES:
        raise UserError(f"--dtype={dtype} is none of {', '.join(DTYPES)}")
    recipe = specialist.recipe
    kind = recipe["model"].get("kind", "")
    if kind != "llama":
        raise UserError(
            f"the format {format!r} takes the shipped network, model.kind = 'llama', and this "
            f"specialist has {kind or 'one of its own'!r}: the format 'soup_jax' takes any, and "
            "package.module:function an exporter of yours"
        )
    settings = ModelSettings.from_mapping(
        recipe["model"], vocab_size=recipe["vocab_size"], seq_len=recipe["seq_len"]
    )
    leaves = {path: np.asarray(x) for path, x in tree.flatten(specialist.params).items()}
    found = Llama(settings, leaves, dtype, recipe["eos_id"])
    if leaves.keys() != {t.leaf for t in found.tensors()}:
        raise UserError(
            f"the format {format!r} takes the shipped network 'llama', and this specialist has "
            f"other leaves: {', '.join(leaves)}"
        )
    return found


def write_recipe(
    specialist: Exportable, folder: pathlib.Path, *, format: str, dtype: str, names: Iterable[str]
) -> None:
    """Write recipe.json, with the hashes of the files `names` that were exported."""
    exported = {
        "format": format,
        "dtype": dtype,
        "files": {name: inputs.sha256_file(folder / name) for name in names},
    }
    files.write_json(
        folder / "recipe.json", files.sealed({**specialist.recipe, "exported": exported})
    )
