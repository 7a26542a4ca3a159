"""What takes documents to the domains of a corpus: its tokenizer, embedder and centroids.

A corpus has it, and whatever makes specialists needs no more of a corpus: a run and a soup folder
keep a copy, in a folder of its own:

    domains.json             an entry per domain, with its label and train windows
    centroids.safetensors    a tree of centroids (`domains.Tree`), quantiles of similarity to them
    tokenizer.json, embedder.json, embedder.safetensors
    map.json                 what else is known of the corpus, and the SHA-256 of these files
"""

import dataclasses
import functools
import pathlib
import shutil
from typing import Any

import numpy as np
import safetensors.numpy

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data.domains import QUANTILES, Tree, gini
from soup_jax.data.embed.base import Embedder, load_embedder
from soup_jax.data.tokenizer import Tokenizer, load_tokenizer
from soup_jax.errors import UserError

FORMAT = 1
FILES = (
    "centroids.safetensors",
    "domains.json",
    "embedder.json",
    "embedder.safetensors",
    "tokenizer.json",
)
_DOMAINS = [{"label": str, "windows": {"train": int}}]
_MAP = {
    "format": int,
    "fingerprint": str,
    "eos_id": int,
    "max_chars": int,
    "vocab_size": int,
    "files": {...: str},
}


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class DomainMap:
    """The domains of a corpus, and the way to them.

    Attributes:
      path: the folder of the files.
      domains: K entries, as in domains.json.
      vocab_size: of the tokenizer; the model's may be larger.
      eos_id: ends every document.
      max_chars: longer documents were cut into pieces of this size, each with a domain of its own.
      domain_frequencies: float64 [K], shares of the train *windows*.
      fingerprint: of the corpus's content: the same wherever and whenever it was prepared.
    """

    path: pathlib.Path
    domains: list[dict[str, Any]]
    vocab_size: int
    eos_id: int
    max_chars: int
    domain_frequencies: np.ndarray
    fingerprint: str

    @property
    def num_domains(self) -> int:
        """K."""
        return len(self.domains)

    def label(self, domain: int) -> str:
        """A few words that tell what the documents of a domain are about."""
        return self.domains[domain]["label"]

    def balance(self) -> str:
        """One sentence on how unequal the domains are, by train windows."""
        windows_K = np.array([entry["windows"]["train"] for entry in self.domains])
        low, middle, high = np.quantile(windows_K, (0.05, 0.5, 0.95), method="nearest")
        return (
            f"{self.num_domains} domains of {windows_K.min():,} to {windows_K.max():,} train "
            f"windows, median {middle:,}, nine in ten from {low:,} to {high:,}; Gini coefficient "
            f"{gini(windows_K):.2f} (0: all equal)"
        )

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the windows."""
        return self._tokenizer

    def embedder(self) -> Embedder:
        """The embedder that the centroids were made with."""
        return self._embedder

    def tree(self) -> Tree:
        """The centroids of the domains, and those above them."""
        return Tree.of(self._tensors).cut(self.num_domains)

    def centroids(self) -> np.ndarray:
        """float32 [K, dim], unit rows."""
        return self.tree().centroids[-1]

    def similarity_quantiles(self) -> dict[float, float]:
        """Quantiles of the similarity of the corpus's documents to the centroid of their domain."""
        coarse = f"similarity_quantiles/{self.num_domains}"
        found = self._tensors.get(coarse, self._tensors["similarity_quantiles"])
        return dict(zip(QUANTILES, found.tolist()))

    # Read once: a server takes documents to domains all day.

    @functools.cached_property
    def _tokenizer(self) -> Tokenizer:
        return load_tokenizer(self.path / "tokenizer.json")

    @functools.cached_property
    def _embedder(self) -> Embedder:
        return load_embedder(self.path)

    @functools.cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return inputs.read_tensors(self.path / "centroids.safetensors")

    def copy_to(self, folder: pathlib.Path) -> None:
        """Write the folder that `open_map` reads, whole or not at all."""
        with files.atomic_folder(folder) as new:
            for name in FILES:
                shutil.copyfile(self.path / name, new / name)
            if self.num_domains != len(self._tensors["centroids"]):  # a coarser level of a tree
                files.write_json(new / "domains.json", self.domains)
                quantiles = np.array([*self.similarity_quantiles().values()], np.float32)
                tensors = {**self.tree().tensors(), "similarity_quantiles": quantiles}
                safetensors.numpy.save_file(tensors, new / "centroids.safetensors")
            described = {
                "format": FORMAT,
                "fingerprint": self.fingerprint,
                "eos_id": self.eos_id,
                "max_chars": self.max_chars,
                "vocab_size": self.vocab_size,
                "files": {name: inputs.sha256_file(new / name) for name in FILES},
            }
            files.write_json(new / "map.json", files.sealed(described))


def open_map(folder: pathlib.Path) -> DomainMap:
    """Read what `DomainMap.copy_to` wrote; its files are compared by hash.

    Raises:
      UserError: missing, of a newer format, or changed since it was written.
    """
    where = folder / "map.json"
    described = inputs.read_json(where)
    inputs.read_format(described, where, newest=FORMAT)
    inputs.check_structure(described, _MAP, where)
    inputs.check_seal(described, where)
    for name in FILES:
        path = folder / name
        if not path.is_file() or inputs.sha256_file(path) != described["files"].get(name):
            raise UserError(f"{path} is missing or not what {where} describes: restore it")
    entries = inputs.read_json(folder / "domains.json", _DOMAINS)
    windows_K = np.asarray([entry["windows"]["train"] for entry in entries], np.float64)
    return DomainMap(
        path=folder,
        domains=entries,
        vocab_size=described["vocab_size"],
        eos_id=described["eos_id"],
        max_chars=described["max_chars"],
        domain_frequencies=windows_K / windows_K.sum(),
        fingerprint=described["fingerprint"],
    )
