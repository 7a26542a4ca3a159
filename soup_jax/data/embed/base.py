"""What an embedder is, and the two files of a corpus folder that hold one.

Corpus and specialist must go through the *same* embedder, so it is an artefact of the corpus:
`embedder.json` (kind, name, dimension and the embedder's settings) and `embedder.safetensors`.
"""

import os
import pathlib
from collections.abc import Sequence
from typing import Any, Protocol, Self

import numpy as np
import safetensors.numpy

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.registry import Registry


class Embedder(Protocol):
    """Texts to unit vectors.

    A class may have two class methods, which `prepare` calls before it reads documents:
    `check(cfg)` raises a UserError where `fit` would, and `source_hash(cfg)` is the hash of what
    `fit` reads from `cfg.path`, so that a corpus is not taken for one made with other weights. With
    `learns = False` it gets no texts.

    Attributes:
      name: tells the kind and the revision; embedders of one name give the same vectors.
      dim: of a vector.
    """

    name: str
    dim: int

    @classmethod
    def fit(cls, cfg: Any, texts: Sequence[str], *, num_workers: int = 1) -> Self:
        """The embedder for a corpus, of which `texts` are a sample.

        `cfg` is the config's `embed` section. The result must not depend on `num_workers`.

        Raises:
          UserError: the texts cannot be embedded.
        """
        ...

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]: rows of L2 norm 1, or zero for a text that it can say nothing about.

        A row depends on its text only.
        """
        ...

    def contents(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What `load` needs: settings that JSON can hold, and tensors."""
        ...

    @classmethod
    def load(cls, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> Self:
        """The embedder whose `contents` these are."""
        ...


EMBEDDERS: Registry[type[Embedder]] = Registry(
    "embedder",
    {
        "tfidf_svd": "soup_jax.data.embed.tfidf_svd:TfidfSvd",
        "minilm": "soup_jax.data.embed.minilm:MiniLm",
    },
)


def save_embedder(embedder: Embedder, directory: pathlib.Path, *, kind: str) -> None:
    """Write the two files, `embedder.json` last: its presence means that both are there.

    `kind` is the name or dotted path by which `load_embedder` finds the class.
    """
    settings, tensors = embedder.contents()
    with files.atomic_path(directory / "embedder.safetensors") as path:
        safetensors.numpy.save_file(tensors, path)
    value = settings | {"kind": kind, "name": embedder.name, "dim": embedder.dim}
    files.write_json(directory / "embedder.json", value)


def load_embedder(directory: str | os.PathLike) -> Embedder:
    """The embedder saved in a corpus folder.

    Raises:
      UserError: files are missing, damaged or of a kind that is not known.
    """
    directory = pathlib.Path(directory)
    value = inputs.read_json(directory / "embedder.json", {"kind": str, "name": str, "dim": int})
    path = directory / "embedder.safetensors"
    try:
        kind = EMBEDDERS.get(value["kind"])
    except UserError as e:
        raise UserError(f"{directory / 'embedder.json'}: {e}") from e
    try:
        embedder = kind.load(value, inputs.read_tensors(path))
    except KeyError as e:
        raise UserError(f"{path} or the embedder.json beside it lacks {e}") from e
    if embedder.name != value["name"]:
        raise UserError(f"{path} does not belong to the embedder.json beside it")
    return embedder


def unit_rows(rows: np.ndarray) -> np.ndarray:
    """float32 rows scaled to length 1; rows without a direction are zero, never NaN."""
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norm > 1e-12, rows / np.maximum(norm, 1e-12), 0).astype(np.float32)
