"""Open a trained soup: the parameters of a run, its corpus, and specialists from them."""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import inputs, soup, tree
from soup_jax.config import schema as config_lib
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.soup import SoupConfig
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists.specialist import Specialist
from soup_jax.storage import refuse_address
from soup_jax.training import build
from soup_jax.training import checkpoint as checkpoint_lib
from soup_jax.training.state import make_init, state_shardings


@dataclasses.dataclass(frozen=True, eq=False)
class Soup:
    """A finished (or unfinished) run, opened for reading.

    Attributes:
      workdir: the run's folder.
      cfg: the run's config, but for what belongs to the devices here.
      corpus: what it was trained on.
      model: the base network.
      mesh: of the devices here.
      params: shared parameters, bank and router.
      step: the optimizer updates behind them.
      newest: the step of the newest checkpoint: another than `step` if an earlier one was asked
        for, or the newest cannot be read.
    """

    workdir: pathlib.Path
    cfg: ConfigDict
    corpus: Corpus
    model: BaseModel
    mesh: Mesh
    params: Params
    step: int
    newest: int

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
        return [self.corpus.label(k) for k in range(self.num_domains)]

    def instantiate(self, texts: Sequence[str]) -> Specialist:
        """The specialist of a few documents: Theta(h) at their histogram h.

        Raises:
          UserError: no documents.
        """
        histogram = document_histogram(self.corpus, texts)
        return self._merged(histogram.h_K, histogram)

    def at(self, h_K: Sequence[float] | np.ndarray) -> Specialist:
        """The specialist Theta(h) of given domain weights.

        Raises:
          UserError: not K weights of at least 0 that add up to 1.
        """
        weights_K = np.asarray(h_K, np.float64)
        good = weights_K.shape == (self.num_domains,) and (weights_K >= 0).all()
        if not good or abs(weights_K.sum() - 1) > 1e-4:
            raise UserError(
                f"h must be {self.num_domains} weights of at least 0 that add up to 1, one for "
                f"each domain; it has shape {weights_K.shape} and sum {weights_K.sum():g}"
            )
        return self._merged(weights_K, None)

    def _merged(self, h_K: np.ndarray, histogram: DocumentHistogram | None) -> Specialist:
        params, alpha_E = jax.jit(soup.specialist, static_argnames="config")(
            self.params, np.asarray(h_K, np.float32), config=self.config
        )
        broken = [p for p, x in tree.flatten(params).items() if not bool(jnp.isfinite(x).all())]
        if broken:
            raise UserError(
                f"the parameters of {self.workdir} at step {self.step} are not finite "
                f"({', '.join(broken[:3])}): take an earlier step"
            )
        return Specialist(
            params=jax.device_get(params),  # an ordinary model, of no mesh
            model=self.model,
            recipe=self._recipe(h_K, np.asarray(alpha_E), histogram),
            tokenizer_path=(self.corpus.path / "tokenizer.json").absolute(),
            histogram=histogram,
        )

    def _recipe(
        self, h_K: np.ndarray, alpha_E: np.ndarray, histogram: DocumentHistogram | None
    ) -> dict[str, Any]:
        cfg = self.cfg
        return {
            "format": recipe_lib.FORMAT,
            "run": str(self.workdir.absolute()),
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
            "eos_id": self.corpus.eos_id,
            "hashes": {
                "corpus": self.corpus.fingerprint,
                "config": inputs.sha256_file(self.workdir / "config.json"),
            },
        }


def load(
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    corpus_dir: str = "",
    model: BaseModel | None = None,
) -> Soup:
    """Open a run: its config, corpus and the parameters of a checkpoint; no optimizer is read.

    Works on any devices, whatever the run was trained on.

    Args:
      step: of the checkpoint; None takes the newest readable one.
      corpus_dir: where the prepared corpus lies now, if not where the config says.
      model: the base network, if it was not the config's.

    Raises:
      UserError: no run there, its corpus is gone or another one, or no such checkpoint.
    """
    workdir = pathlib.Path(workdir)
    cfg = _config(workdir)
    with cfg.unlocked():
        cfg.mesh.replica, cfg.mesh.fsdp = 1, -1  # this machine's devices, not the training's
        cfg.mesh.platform, cfg.mesh.num_devices = "", 0
        if cfg.model.attention == "cudnn":  # of the training's GPUs; there may be none here
            cfg.model.attention = "auto"
        if model is not None:
            cfg.model.kind = ""  # a recipe must not name another network
        cfg.batch_size = cfg.num_mixtures * cfg.optimizer.grad_accumulation * jax.device_count()
    corpus = corpus_of(workdir, corpus_dir=corpus_dir)
    mesh = build.make_mesh(cfg)
    model = model or build.base_model(cfg)
    optimizer = build.optimizer_config(cfg)
    abstract = jax.eval_shape(
        make_init(
            build.soup_config(cfg),
            optimizer,
            model,
            seed=cfg.seed,
            frequencies_K=corpus.domain_frequencies,
            centroids_KC=corpus.centroids() if cfg.router.init == "centroids" else None,
        )
    )
    shardings = state_shardings(mesh, abstract, optimizer)
    target = checkpoint_lib.abstract_with_shardings(abstract.params, shardings.params)
    with checkpoint_lib.Checkpointer(workdir / "checkpoints") as checkpointer:
        params, step = checkpointer.restore_params(target, step=step)
        newest = checkpointer.steps()[-1]
        fingerprint = checkpointer.data(step)["fingerprint"]["corpus"]
    if fingerprint != corpus.fingerprint:
        raise UserError(
            f"{workdir} was trained on another corpus than {corpus.path} holds now "
            f"(fingerprint {fingerprint[:12]} -> {corpus.fingerprint[:12]}); give the folder of "
            "the old one"
        )
    return Soup(workdir, cfg, corpus, model, mesh, params, step, newest)


def corpus_of(workdir: str | pathlib.Path, *, corpus_dir: str = "") -> Corpus:
    """The corpus that a run's config names, or the one in `corpus_dir`; the run is not opened.

    Raises:
      UserError: no run there, or its corpus is gone.
    """
    cfg = _config(pathlib.Path(workdir))
    try:
        return open_corpus(corpus_dir or cfg.corpus.dir)
    except UserError as e:
        raise UserError(
            f"{e}. If the corpus of {workdir} lies elsewhere, make a link to it there, or give its "
            "folder: --corpus=DIR of `instantiate`, corpus_dir in Python"
        ) from e


def _config(workdir: pathlib.Path) -> ConfigDict:
    refuse_address(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not a run: it has no config.json (see `soup-jax train`)")
    return config_lib.load(workdir / "config.json")
