"""A specialist from a few documents: embed, histogram, route, merge, save. No training.

A specialist is a folder: `params.safetensors` (leaf paths joined by "/"), `recipe.json` (h, alpha,
what it was made from, with hashes) and `tokenizer.json`.
"""

import dataclasses
import logging
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file

from soup_jax import soup, tree
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.errors import UserError
from soup_jax.evaluation import evaluate
from soup_jax.hardware.mesh import make_mesh
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Params
from soup_jax.training import build
from soup_jax.training import checkpoint as checkpoint_lib
from soup_jax.training.state import make_init, state_shardings

_log = logging.getLogger(__name__)

FORMAT = 1


@dataclasses.dataclass(frozen=True)
class TrainedSoup:
    """A finished (or unfinished) run, opened for reading."""

    workdir: pathlib.Path
    cfg: ConfigDict
    corpus: Corpus
    model: BaseModel
    mesh: Any
    params: Params
    step: int

    def config(self) -> soup.SoupConfig:
        """The soup's static settings."""
        return build.soup_config(self.cfg)


def load_soup(
    workdir: str | pathlib.Path,
    *,
    step: int | None = None,
    corpus_dir: str = "",
    model: BaseModel | None = None,
) -> TrainedSoup:
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
    if not (workdir / "config.json").exists():
        raise UserError(f"{workdir} is not a run: it has no config.json (see `soup-jax train`)")
    cfg = config_lib.load(workdir / "config.json")
    with cfg.unlocked():
        cfg.mesh.replica, cfg.mesh.fsdp = 1, -1  # this machine's devices, not the training's
        cfg.mesh.platform, cfg.mesh.num_devices = "", 0
        if cfg.model.attention == "cudnn":  # of the training's GPUs; there may be none here
            cfg.model.attention = "auto"
        cfg.batch_size = cfg.num_mixtures * cfg.optimizer.grad_accumulation * jax.device_count()
    corpus = open_corpus(corpus_dir or cfg.corpus.dir)
    mesh = make_mesh(cfg)
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
        fingerprint = checkpointer.data(step)["fingerprint"]["corpus"]
    if fingerprint != corpus.fingerprint:
        raise UserError(
            f"{workdir} was trained on another corpus than {corpus.path} holds now "
            f"(fingerprint {fingerprint[:12]} -> {corpus.fingerprint[:12]}); give the folder of "
            "the old one"
        )
    return TrainedSoup(workdir, cfg, corpus, model, mesh, params, step)


@dataclasses.dataclass(frozen=True)
class Specialist:
    """One merged model and where it came from."""

    params: Params
    histogram: DocumentHistogram
    alpha_E: np.ndarray


def instantiate(trained: TrainedSoup, texts: Sequence[str]) -> Specialist:
    """The specialist of a few documents: Theta(h) at their histogram h.

    Raises:
      UserError: no documents.
    """
    histogram = document_histogram(trained.corpus, texts)
    params, alpha_E = jax.jit(soup.specialist, static_argnames="config")(
        trained.params, np.asarray(histogram.h_K, np.float32), config=trained.config()
    )
    return Specialist(params, histogram, np.asarray(alpha_E))


def save(trained: TrainedSoup, specialist: Specialist, out: pathlib.Path) -> None:
    """Write the specialist's folder; the recipe comes last, so a folder with one is complete.

    Raises:
      UserError: `out` exists and is not a specialist's folder.
    """
    foreign = out.is_file() or (out.exists() and any(out.iterdir()))
    if foreign and not (out / "recipe.json").exists():
        raise UserError(f"{out} exists and is not a specialist; choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / "recipe.json").unlink(missing_ok=True)
    leaves = {k: np.ascontiguousarray(v) for k, v in tree.flatten(specialist.params).items()}
    with files.atomic_path(out / "params.safetensors") as temporary:
        save_file(leaves, temporary)
    shutil.copyfile(trained.corpus.path / "tokenizer.json", out / "tokenizer.json")
    files.write_json(out / "recipe.json", recipe(trained, specialist, out))


def recipe(trained: TrainedSoup, specialist: Specialist, out: pathlib.Path) -> dict[str, Any]:
    """What reproduces the specialist: h, alpha, domain labels, and hashes of what it came from."""
    cfg, corpus = trained.cfg, trained.corpus
    return {
        "format": FORMAT,
        "run": str(trained.workdir.absolute()),
        "name": cfg.name,
        "step": trained.step,
        "h": [float(x) for x in specialist.histogram.h_K],
        "alpha": [float(x) for x in specialist.alpha_E],
        "domains": [corpus.label(k) for k in range(corpus.num_domains)],
        "num_documents": specialist.histogram.num_documents,
        "share_outside_domains": specialist.histogram.outside,
        "model": dict(cfg.model),
        "vocab_size": cfg.vocab_size,
        "seq_len": cfg.seq_len,
        "eos_id": corpus.eos_id,
        "hashes": {
            "corpus": corpus.fingerprint,
            "config": files.sha256_file(trained.workdir / "config.json"),
            "tokenizer": files.sha256_file(out / "tokenizer.json"),
            "params": files.sha256_file(out / "params.safetensors"),
        },
    }


def load_specialist(folder: str | pathlib.Path) -> tuple[Params, dict[str, Any]]:
    """(parameters, recipe) of a folder written by `save`; the parameters' hash is checked.

    The recipe's `model` has today's fields, whichever version wrote it.

    Raises:
      UserError: not a specialist's folder, incomplete, of a later version, or changed since it was
        written.
    """
    folder = pathlib.Path(folder)
    made = _read_recipe(folder / "recipe.json")
    path = folder / "params.safetensors"
    if not path.exists() or files.sha256_file(path) != made["hashes"]["params"]:
        raise UserError(f"{path} is missing or not what its recipe.json describes; make it again")
    text = folder / "tokenizer.json"
    if not text.exists() or files.sha256_file(text) != made["hashes"]["tokenizer"]:
        raise UserError(f"{text} is missing or not what its recipe.json describes; make it again")
    return tree.unflatten(load_file(path)), made


def _read_recipe(path: pathlib.Path) -> dict[str, Any]:
    made = files.read_json(path)
    files.read_format(made, path, newest=FORMAT)
    missing = [
        name for name in ("h", "vocab_size", "eos_id", "model", "hashes") if name not in made
    ]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}: make the specialist again")
    return {**made, "model": config_lib.restore_section("model", made["model"], where=path)}


def instantiate_to(
    run: str | pathlib.Path,
    documents: str,
    out: str | pathlib.Path,
    *,
    step: int | None = None,
    corpus_dir: str = "",
) -> tuple[Specialist, list[tuple[str, float]]]:
    """`soup-jax instantiate`: from a run and a file of documents to a specialist's folder.

    Returns:
      The specialist, and (label, weight) of the domains its documents resemble most.
    """
    trained = load_soup(run, step=step, corpus_dir=corpus_dir)
    texts, damage = evaluate.read_texts(documents, text_field=trained.cfg.corpus.text_field)
    for line in damage:
        _log.warning("%s", line)
    specialist = instantiate(trained, [d.text for d in texts])
    save(trained, specialist, pathlib.Path(out))
    return specialist, specialist.histogram.nearest(trained.corpus)
