"""Open a trained soup, a run's or one in a folder of its own, and make specialists from it."""

import dataclasses
import functools
import logging
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
from soup_jax.data import domain_map
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.domain_map import DomainMap
from soup_jax.errors import DamagedError, UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.soup import SoupConfig
from soup_jax.specialists import folder as folder_lib
from soup_jax.specialists import recipe as recipe_lib
from soup_jax.specialists import stored
from soup_jax.specialists.specialist import Specialist
from soup_jax.specialists.stored import Arrays
from soup_jax.storage import refuse_address
from soup_jax.training import build
from soup_jax.training.checkpoint import TRYING, Checkpointer
from soup_jax.training.checkpoint_arrays import open_params
from soup_jax.training.state import state_shardings

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Soup:
    """A finished (or unfinished) run, or a soup folder, opened for reading.

    Its parameters stay on disk until `params` is asked for: a specialist is merged from blocks of
    the bank. With `params` on the devices it takes milliseconds.

    Attributes:
      workdir: the folder.
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
        return _open_corpus(self.corpus_dir, self.workdir, self.map.fingerprint)

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

    def instantiate(self, texts: Sequence[str]) -> Specialist:
        """The specialist of a few documents: Theta(h) at their histogram h.

        Raises:
          UserError: no documents.
        """
        histogram = document_histogram(self.map, texts)
        (made,) = self._merged(histogram.h_K[None], [histogram])
        return made

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
        return self._merged(weights_MK, [None] * len(weights_MK))

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
        with Checkpointer(self.workdir / "checkpoints") as checkpointer:
            if self.step <= min(checkpointer.steps()):
                raise error
            _log.warning(TRYING, error)
            make = build.initial_state(self.cfg, self.model, self.map)
            abstract = jax.eval_shape(make).params
            arrays, step = open_params(checkpointer, abstract, before=self.step)
        return dataclasses.replace(self, arrays=arrays, step=step)

    @property
    def _where(self) -> str:
        return f"{self.workdir} at step {self.step}"

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
        """alpha_ME of domain weights [M, K], float32."""
        router = stored.read_below(self.arrays, "router")
        weights_MK = jnp.asarray(h_MK, jnp.float32)
        return np.asarray(soup.coefficients({"router": router}, weights_MK, self.config))

    def _merged(
        self, h_MK: np.ndarray, histograms: Sequence[DocumentHistogram | None]
    ) -> list[Specialist]:
        if "params" in vars(self):
            found = [_on_devices(self.params, h_K, self.config) for h_K in h_MK]
            alphas, merged = [alpha_E for _, alpha_E in found], [params for params, _ in found]
        else:
            try:
                alpha_ME = self.coefficients(h_MK)  # [1, 0] without experts
                alphas = list(np.broadcast_to(alpha_ME, (len(h_MK), self.num_experts)))
                merged = stored.merge(self.arrays, np.stack(alphas))
            except DamagedError as e:
                return self.earlier(e)._merged(h_MK, histograms)
        made = []
        for h_K, alpha_E, params, histogram in zip(h_MK, alphas, merged, histograms):
            leaves = tree.flatten(params)
            if broken := [p for p, x in leaves.items() if not np.isfinite(x).all()]:
                raise UserError(
                    f"the parameters of {self._where} are not finite ({', '.join(broken[:3])}): "
                    "take an earlier step"
                )
            made.append(
                Specialist(
                    params=params,  # an ordinary model, of no mesh
                    model=self.model,
                    recipe=self._recipe(h_K, alpha_E, histogram),
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
            "eos_id": self.map.eos_id,
            "hashes": {
                "corpus": self.map.fingerprint,
                "config": inputs.sha256_file(self.workdir / "config.json"),
            },
        }


def _on_devices(params: Params, h_K: np.ndarray, config: SoupConfig) -> tuple[Params, np.ndarray]:
    merged, alpha_E = jax.jit(soup.specialist, static_argnames="config")(
        params, np.asarray(h_K, np.float32), config=config
    )
    return jax.device_get(merged), np.asarray(alpha_E)


def load(
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    corpus_dir: str = "",
    model: BaseModel | None = None,
) -> Soup:
    """Open a run or a soup folder; of its parameters nothing is read yet.

    Works on any devices, whatever the run was trained on.

    Args:
      step: of a run's checkpoint; None takes the newest readable one.
      corpus_dir: where the prepared corpus lies now, if not where the config says; needed for runs
        of earlier versions, and to score the generic validation split.
      model: the base network, if it was not the config's.

    Raises:
      UserError: neither is there, or no such checkpoint, or a run of an earlier version whose
        corpus is gone.
    """
    workdir = pathlib.Path(workdir)
    if (workdir / "soup.json").exists():
        return _load_folder(workdir, step=step, corpus_dir=corpus_dir, model=model)
    cfg = _here(_config(workdir), model)
    copy = workdir / "domains"
    if (copy / "map.json").exists():
        domains = domain_map.open_map(copy)
        if corpus_dir:
            _open_corpus(corpus_dir, workdir, domains.fingerprint)
    else:
        domains = _open_corpus(corpus_dir or cfg.corpus.dir, workdir, None)
    model = model or build.base_model(cfg)
    with Checkpointer(workdir / "checkpoints") as checkpointer:
        abstract = jax.eval_shape(build.initial_state(cfg, model, domains)).params
        arrays, found = open_params(checkpointer, abstract, step=step)
        newest = checkpointer.steps()[-1]
        fingerprint = checkpointer.data(found)["fingerprint"]["corpus"]
    if fingerprint != domains.fingerprint:
        raise _another(workdir, domains, fingerprint)
    return Soup(
        workdir=workdir,
        cfg=cfg,
        map=domains,
        model=model,
        arrays=arrays,
        step=found,
        newest=newest,
        corpus_dir=corpus_dir or cfg.corpus.dir,
        fixed=step is not None,
    )


def _load_folder(
    folder: pathlib.Path, *, step: int | None, corpus_dir: str, model: BaseModel | None
) -> Soup:
    described, arrays = folder_lib.read(folder)
    if step not in (None, described["step"]):
        raise UserError(f"{folder} holds step {described['step']}, not {step}")
    cfg = _here(config_lib.load(folder / "config.json"), model)
    return Soup(
        workdir=folder,
        cfg=cfg,
        map=domain_map.open_map(folder / "domains"),
        model=model or build.base_model(cfg),
        arrays=arrays,
        step=described["step"],
        newest=described["step"],
        corpus_dir=corpus_dir or cfg.corpus.dir,
        fixed=True,
    )


def _here(cfg: ConfigDict, model: BaseModel | None) -> ConfigDict:
    # The config on this machine's devices, not the training's.
    with cfg.unlocked():
        cfg.mesh.replica, cfg.mesh.fsdp = 1, -1
        cfg.mesh.platform, cfg.mesh.num_devices = "", 0
        if cfg.model.attention == "cudnn":  # of the training's GPUs; there may be none here
            cfg.model.attention = "auto"
        if model is not None:
            cfg.model.kind = ""  # a recipe must not name another network
        cfg.batch_size = cfg.num_mixtures * cfg.optimizer.grad_accumulation * jax.device_count()
    return cfg


def corpus_of(workdir: str | pathlib.Path, *, corpus_dir: str = "") -> Corpus:
    """The corpus that a run's config names, or the one in `corpus_dir`; the run is not opened.

    Raises:
      UserError: no run there, or its corpus is gone.
    """
    workdir = pathlib.Path(workdir)
    return _open_corpus(corpus_dir or _config(workdir).corpus.dir, workdir, None)


def _config(workdir: pathlib.Path) -> ConfigDict:
    refuse_address(workdir)
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} is not a run: it has no config.json (see `soup-jax train`); nor a soup "
            "folder: it has no soup.json (see `soup-jax pack`)"
        )
    return config_lib.load(workdir / "config.json")


def _open_corpus(directory: str, workdir: pathlib.Path, fingerprint: str | None) -> Corpus:
    try:
        corpus = open_corpus(directory)
    except UserError as e:
        raise UserError(
            f"{e}. If the corpus of {workdir} lies elsewhere, make a link to it there, or give its "
            "folder: --corpus=DIR of `instantiate`, corpus_dir in Python"
        ) from e
    if fingerprint not in (None, corpus.fingerprint):
        raise _another(workdir, corpus, fingerprint)
    return corpus


def _another(workdir: pathlib.Path, domains: DomainMap, fingerprint: str) -> UserError:
    return UserError(
        f"{workdir} was trained on another corpus than {domains.path} holds now "
        f"(fingerprint {fingerprint[:12]} -> {domains.fingerprint[:12]}); give the folder of "
        "the old one"
    )
