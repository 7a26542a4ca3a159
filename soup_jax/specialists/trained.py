"""A trained soup, on disk or on the devices, and the specialists that are made from it."""

import dataclasses
import functools
import logging
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import inputs, places, soup, tree
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.domain_map import DomainMap
from soup_jax.errors import DamagedError, UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.soup import SoupConfig, merge
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists import stored
from soup_jax.specialists.search import OVER, Found, search, search_bytes
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.stored import Arrays
from soup_jax.storage import nulled
from soup_jax.training import build
from soup_jax.training.checkpoint import TRYING, Checkpointer
from soup_jax.training.checkpoint_arrays import open_params
from soup_jax.training.state import state_shardings

_log = logging.getLogger(__name__)

METHODS = ("auto", "histogram", *OVER)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Soup:
    """A finished (or unfinished) run, or a soup folder, opened for reading.

    Its parameters stay on disk until `params` is asked for: a specialist is merged from blocks of
    the bank. With `params` on the devices it takes milliseconds.

    Attributes:
      workdir: the folder; of one in a bucket, the copy here.
      address: in a bucket, where.
      cfg: the run's config, but for what belongs to the devices here.
      map: its domains, and the way from documents to them.
      model: the base network.
      arrays: the parameters on disk.
      step: the optimizer updates behind them.
      newest: the step of the newest checkpoint: another than `step` if an earlier one was asked
        for, or the newest cannot be read.
      corpus_dir: where the corpus lies, as far as is known here.
      fixed: no older checkpoint may take its place, should its arrays turn out damaged.
    """

    workdir: pathlib.Path
    cfg: ConfigDict
    map: DomainMap
    model: BaseModel
    arrays: Arrays
    step: int
    newest: int
    corpus_dir: str
    fixed: bool
    address: str = ""

    @property
    def place(self) -> str:
        """The folder, as a user names it."""
        return self.address or str(self.workdir)

    @property
    def config(self) -> SoupConfig:
        """The soup's static settings."""
        return build.soup_config(self.cfg)

    @property
    def num_experts(self) -> int:
        """E; 0 is a model without experts."""
        return self.cfg.num_experts

    @property
    def num_domains(self) -> int:
        """K."""
        return self.cfg.num_domains

    @property
    def domains(self) -> list[str]:
        """A readable label for each of the K domains."""
        return [self.map.label(k) for k in range(self.num_domains)]

    @functools.cached_property
    def corpus(self) -> Corpus:
        """What it was trained on.

        Raises:
          UserError: gone, or another one.
        """
        return open_corpus_of(self.corpus_dir, self.workdir, self.map.fingerprint, self.cfg)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Of the devices here."""
        return build.make_mesh(self.cfg)

    @functools.cached_property
    def params(self) -> Params:
        """Shared parameters, bank and router, on the devices; they are read when first asked for.

        Raises:
          UserError: they cannot be read, or are not what was saved.
        """
        abstract = jax.eval_shape(build.initial_state(self.cfg, self.model, self.map))
        optimizer = build.optimizer_config(self.cfg)
        shardings = state_shardings(self.mesh, abstract, optimizer).params
        return stored.read_all(self.arrays, shardings)

    def instantiate(self, texts: Sequence[str], *, method: str = "histogram") -> Specialist:
        """The specialist of a few documents; see `instantiate_each`."""
        (made,) = self.instantiate_each([texts], method=method)
        return made

    def instantiate_each(
        self, documents: Sequence[Sequence[str]], *, method: str = "histogram"
    ) -> list[Specialist]:
        """The specialists of several sets of documents, through shared reads of the bank.

        Args:
          method: "histogram": the merge at their histogram h, Theta(h); "search": at coefficients
            that predict the documents better, found from there (see `search`); "search_h": at
            domain weights that do so; "auto", the default of commands: see `method`.

        Raises:
          UserError: no documents, or no such method.
        """
        if method not in METHODS:
            raise UserError(f"method {method!r} is none of {', '.join(METHODS)}")
        histograms = [document_histogram(self.map, texts) for texts in documents]
        h_MK = np.stack([histogram.h_K for histogram in histograms])
        try:
            alpha_ME, h_MK, found = self.find(h_MK, documents, [method] * len(documents))
            return self.make(h_MK, alpha_ME, histograms=histograms, found=found)
        except DamagedError as e:
            return self.earlier(e).instantiate_each(documents, method=method)

    def method(self, name: str) -> str:
        """One of METHODS; "auto" is "search", or "histogram" where a search would read the bank
        from disk in each of its steps."""
        if name != "auto":
            return name
        return "search" if stored.are_held(self.arrays) else "histogram"

    def memory(self, num_models: int, methods: Sequence[str]) -> str:
        """A sentence on what making so many specialists, by these methods, holds at most."""
        searched = sum(self.method(name) in OVER for name in methods)
        size = stored.merge_bytes(self.arrays, num_models)
        if searched:
            size = max(size, search_bytes(self.arrays, searched))
        work = "searching" if searched else "merging"
        if num_models > 1:
            work += f" {num_models} at a time"
        text = f"{work} holds about {size / 1e6:,.0f} MB of arrays, beside the program and its code"
        if "auto" in methods and not searched:
            limit = f"{stored.HELD_BYTES / 2**30:.0f} GiB"
            text += f". A soup of more than {limit} is not searched in, unless the method says so"
        return text

    def find(
        self, h_MK: np.ndarray, documents: Sequence[Sequence[str]], methods: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray, list[Found | None]]:
        """(alpha_ME, h_MK, searches) of histograms h and their documents, each by its method.

        Raises:
          DamagedError: an array is not what was saved.
        """
        alpha_ME, h_MK = self.coefficients(h_MK).copy(), np.array(h_MK)
        found: list[Found | None] = [None] * len(methods)
        methods = [self.method(name) for name in methods]
        for method, over in OVER.items():
            chosen = [m for m, name in enumerate(methods) if name == method]
            texts = [documents[m] for m in chosen]
            for m, result in zip(chosen, search(self, texts, h_MK[chosen], over=over)):
                found[m], alpha_ME[m], h_MK[m] = result, result.alpha_E, result.h_K
        return alpha_ME, h_MK, found

    def at(self, h_K: Sequence[float] | np.ndarray) -> Specialist:
        """The specialist Theta(h) of given domain weights.

        Raises:
          UserError: not K weights of at least 0 that add up to 1.
        """
        (made,) = self.at_each(np.asarray(h_K, np.float64)[None])
        return made

    def at_each(self, h_MK: Sequence[Sequence[float]] | np.ndarray) -> list[Specialist]:
        """The specialists of several domain weights [M, K], through one read of the bank.

        Raises:
          UserError: as `at`.
        """
        weights_MK = np.asarray(h_MK, np.float64)
        for h_K in weights_MK:
            good = h_K.shape == (self.num_domains,) and (h_K >= 0).all()
            if not good or abs(h_K.sum() - 1) > 1e-4:
                raise UserError(
                    f"h must be {self.num_domains} weights of at least 0 that add up to 1, one for "
                    f"each domain; it has shape {h_K.shape} and sum {h_K.sum():g}"
                )
        try:
            return self.make(weights_MK, self.coefficients(weights_MK))
        except DamagedError as e:
            return self.earlier(e).at_each(weights_MK)

    def resident(self) -> "Soup":
        """This soup with `params` on the devices; if they are damaged, that of an older checkpoint.

        Raises:
          UserError: there is none, or a step was asked for.
        """
        try:
            jax.block_until_ready(self.params)
        except DamagedError as e:
            return self.earlier(e).resident()
        return self

    def earlier(self, error: DamagedError) -> "Soup":
        """That of an older checkpoint, after an error; which is raised if there is none."""
        if self.fixed:
            raise error
        with Checkpointer(places.checkpoints(self.address or self.workdir)) as checkpointer:
            if self.step <= min(checkpointer.steps()):
                raise error
            _log.warning(TRYING, error)
            make = build.initial_state(self.cfg, self.model, self.map)
            abstract = jax.eval_shape(make).params
            arrays, step = open_params(checkpointer, abstract, before=self.step)
        return dataclasses.replace(self, arrays=arrays, step=step)

    @property
    def _where(self) -> str:
        return f"{self.place} at step {self.step}"

    def generic(self) -> Specialist:
        """The specialist of the natural frequencies: of text like the corpus."""
        return self.at(self.map.domain_frequencies)

    def shared(self) -> Specialist:
        """The shared parameters alone: a specialist without experts, at natural frequencies."""
        frequencies_K = self.map.domain_frequencies
        return Specialist(
            params=stored.read_below(self.arrays, "shared"),
            model=self.model,
            recipe=self._recipe(frequencies_K, np.zeros(self.num_experts, np.float32), None),
            tokenizer_path=(self.map.path / "tokenizer.json").absolute(),
        )

    def coefficients(self, h_MK: np.ndarray) -> np.ndarray:
        """alpha_ME of domain weights [M, K], float32; [M, 0] without experts.

        Raises:
          DamagedError: the router is not what was saved.
        """
        if not self.num_experts:
            return np.zeros((len(h_MK), 0), np.float32)
        resident = "params" in vars(self)
        router = self.params["router"] if resident else stored.read_below(self.arrays, "router")
        # One by one: what the rounding of sums does must not depend on which others there are.
        found = [
            _coefficients(router, jnp.asarray(h_K, jnp.float32)[None], self.config) for h_K in h_MK
        ]
        return np.concatenate(found)

    def on_devices(self, alpha_E: np.ndarray) -> Params:
        """The merged parameters of coefficients, from the bank on the devices."""
        return _merge(self.params["shared"], self.params["bank"], alpha_E)

    def make(
        self,
        h_MK: np.ndarray,
        alpha_ME: np.ndarray,
        *,
        histograms: Sequence[DocumentHistogram | None] | None = None,
        found: Sequence[Found | None] | None = None,
    ) -> list[Specialist]:
        """The specialists of given coefficients [M, E], whatever their domain weights say.

        Args:
          h_MK: what their recipes say of domain weights.
          histograms: of the documents that gave these.
          found: the searches that gave the coefficients; None where there was none.

        Raises:
          DamagedError: an array is not what was saved.
          UserError: the soup's parameters are not finite.
        """
        if "params" in vars(self):
            merged = [jax.device_get(self.on_devices(alpha_E)) for alpha_E in alpha_ME]
        else:
            merged = stored.merge(self.arrays, alpha_ME)
        made = []
        for m, params in enumerate(merged):
            leaves = tree.flatten(params)
            if broken := [p for p, x in leaves.items() if not np.isfinite(x).all()]:
                raise UserError(
                    f"the parameters of {self._where} are not finite ({', '.join(broken[:3])}): "
                    "take an earlier step"
                )
            histogram = histograms[m] if histograms else None
            recipe = self._recipe(h_MK[m], alpha_ME[m], histogram)
            if found and (one := found[m]) is not None:
                steps = {"steps": one.steps, "start_loss": one.start_loss, "loss": one.loss}
                recipe["search"] = steps
            made.append(
                Specialist(
                    params=params,  # an ordinary model, of no mesh
                    model=self.model,
                    recipe=nulled(recipe),
                    tokenizer_path=(self.map.path / "tokenizer.json").absolute(),
                    histogram=histogram,
                )
            )
        return made

    def _recipe(
        self, h_K: np.ndarray, alpha_E: np.ndarray, histogram: DocumentHistogram | None
    ) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "format": recipe_lib.FORMAT,
            "run": self.address or str(self.workdir.absolute()),
            "name": cfg.name,
            "step": self.step,
            "h": [float(x) for x in h_K],
            "alpha": [float(x) for x in alpha_E],
            "domains": self.domains,
            "num_documents": histogram.num_documents if histogram else 0,
            "share_outside_domains": histogram.outside if histogram else 0.0,
            "model": dict(cfg.model),
            "vocab_size": cfg.vocab_size,
            "seq_len": cfg.seq_len,
            "eos_id": self.map.eos_id,
            "hashes": {
                "corpus": self.map.fingerprint,
                "config": inputs.sha256_file(self.workdir / "config.json"),
            },
        }


@functools.partial(jax.jit, static_argnums=2)
def _coefficients(router: Params, h_MK: Array, config: SoupConfig) -> Array:
    return soup.coefficients({"router": router}, h_MK, config)


_merge = jax.jit(merge.merge)


def open_corpus_of(
    directory: str, workdir: pathlib.Path, fingerprint: str | None, cfg: ConfigDict
) -> Corpus:
    """The corpus in a folder, at the level of a run or soup folder, whose it must be.

    Raises:
      UserError: it is gone, or another one than the fingerprint says; None takes any.
    """
    # The training's folder of copies, where this is its machine, and ours to write.
    cache = cfg.corpus.cache_dir if os.access(cfg.corpus.cache_dir, os.W_OK) else ""
    try:
        corpus = open_corpus(directory, num_domains=cfg.num_domains, cache_dir=cache)
    except UserError as e:
        raise UserError(
            f"{e}. If the corpus of {workdir} lies elsewhere, make a link to it there, or give its "
            "folder: --corpus=DIR of `instantiate` and `mix`, corpus_dir in Python"
        ) from e
    if fingerprint not in (None, corpus.fingerprint):
        raise another_corpus(workdir, corpus, fingerprint)
    return corpus


def another_corpus(workdir: pathlib.Path, domains: DomainMap, fingerprint: str) -> UserError:
    """That a run was trained on another corpus."""
    return UserError(
        f"{workdir} was trained on another corpus than {domains.path} holds now "
        f"(fingerprint {fingerprint[:12]} -> {domains.fingerprint[:12]}); give the folder of "
        "the old one"
    )
