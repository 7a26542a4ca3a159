"""Open a trained soup: a run's, or one in a folder of its own."""

import pathlib

import jax
from ml_collections import ConfigDict

from soup_jax import places, remote
from soup_jax.config import schema as config_lib
from soup_jax.data import domain_map
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_map import DomainMap
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.specialists import folder as folder_lib
from soup_jax.specialists import stored
from soup_jax.specialists.trained import Soup, another_corpus, open_corpus_of
from soup_jax.training import build
from soup_jax.training.checkpoint import Checkpointer
from soup_jax.training.checkpoint_arrays import open_params


def load(
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    average: int = 1,
    corpus_dir: str = "",
    model: BaseModel | None = None,
) -> Soup:
    """Open a run or a soup folder; of its parameters nothing is read yet.

    Works on any devices, whatever the run was trained on.

    Args:
      step: of a run's checkpoint; None takes the newest readable one.
      average: take the mean of so many checkpoints up to that one (`stored.Averaged`).
      corpus_dir: where the prepared corpus lies now, if not where the config says; needed for runs
        of earlier versions, and to score the generic validation split.
      model: the base network, if it was not the config's.

    Raises:
      UserError: neither is there, or no such checkpoint, or a run of an earlier version whose
        corpus is gone.
    """
    place, workdir = workdir, places.local(workdir)
    address = remote.spelled(place).rstrip("/") if remote.is_object(place) else ""
    if (workdir / "soup.json").exists():
        if average != 1:
            raise UserError(f"{place} is a soup folder, of one checkpoint: average those of a run")
        return _load_folder(workdir, address, step=step, corpus_dir=corpus_dir, model=model)
    cfg = _here(_config(workdir), model)
    copy = workdir / "domains"
    if (copy / "map.json").exists():
        domains = domain_map.open_map(copy)
        if corpus_dir:
            open_corpus_of(corpus_dir, workdir, domains.fingerprint, cfg)
    else:
        folder = corpus_dir or cfg.corpus.dir
        domains = open_corpus_of(folder, workdir, None, cfg)
    model = model or build.base_model(cfg)
    with Checkpointer(places.checkpoints(place)) as checkpointer:
        abstract = jax.eval_shape(build.initial_state(cfg, model, domains)).params
        arrays: stored.Arrays
        arrays, found = open_params(checkpointer, abstract, step=step)
        if average != 1:
            steps = [s for s in checkpointer.steps() if s <= found][-average:]
            if not 0 < average == len(steps):
                raise UserError(
                    f"the mean of {average} checkpoints up to step {found} is asked for, and "
                    f"{workdir} holds {len(steps)} (checkpoint.keep_latest)"
                )
            arrays = stored.Averaged(
                [open_params(checkpointer, abstract, step=s)[0] for s in steps]
            )
        newest = checkpointer.steps()[-1]
        fingerprint = checkpointer.data(found)["fingerprint"]["corpus"]
    if fingerprint != domains.fingerprint:
        raise another_corpus(workdir, domains, fingerprint)
    return Soup(
        workdir=workdir,
        cfg=cfg,
        map=domains,
        model=model,
        arrays=arrays,
        step=found,
        newest=newest,
        corpus_dir=corpus_dir or cfg.corpus.dir,
        fixed=step is not None or average != 1,
        address=address,
    )


def _load_folder(
    folder: pathlib.Path,
    address: str,
    *,
    step: int | None,
    corpus_dir: str,
    model: BaseModel | None,
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
        address=address,
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
    workdir = places.local(workdir)
    cfg = _config(workdir)
    folder = corpus_dir or cfg.corpus.dir
    return open_corpus_of(folder, workdir, None, cfg)


def map_of(*, run: str = "", corpus_dir: str = "", num_domains: int = 0) -> DomainMap:
    """The domains of a run or soup folder, or of a corpus, perhaps at a coarser level of it.

    Raises:
      UserError: none of these is there, or the corpus has no such level.
    """
    if run:
        workdir = places.local(run)
        if (workdir / "domains" / "map.json").exists():
            return domain_map.open_map(workdir / "domains")
        return corpus_of(workdir)  # a run of an earlier version
    corpus = open_corpus(corpus_dir, num_domains=num_domains)
    if num_domains not in (0, corpus.num_domains):
        sizes = ", ".join(map(str, corpus.tree().sizes))
        raise UserError(f"{corpus_dir} has no level of {num_domains} domains; it has {sizes}")
    return corpus


def _config(workdir: pathlib.Path) -> ConfigDict:
    if not (workdir / "config.json").exists():
        raise UserError(
            f"{workdir} is not a run: it has no config.json (see `soup-jax train`); nor a soup "
            "folder: it has no soup.json (see `soup-jax pack`)"
        )
    return config_lib.load(workdir / "config.json")
