"""A training run, set up and checked before its first step.

Where the state comes from: the newest checkpoint of the workdir, else the config's seed. Config,
corpus, mesh, workdir and checkpoint are compared with each other, and any mismatch is refused with
both sides shown.
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import storage as files
from soup_jax import tree
from soup_jax.config import schema as config_lib
from soup_jax.data import loader
from soup_jax.data import meta_distribution as domain_weights
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.hardware import compile_cache
from soup_jax.models.base import BaseModel
from soup_jax.processes import start as distributed
from soup_jax.processes import watchdog
from soup_jax.processes.group import Solo
from soup_jax.training import build, trackers
from soup_jax.training import checkpoint as checkpoint_lib
from soup_jax.training.state import TrainState, make_init, state_shardings

# A network file system may remember for so long that a file was not there.
_SEE_FILE_SECS = 60


@dataclasses.dataclass
class Run:
    """What a training run is made of, set up before the first step."""

    cfg: ConfigDict
    workdir: pathlib.Path
    corpus: Corpus
    model: BaseModel
    mesh: Mesh
    plan: SamplingPlan
    abstract: TrainState  # with shardings: the target of a restore
    init: Any  # () -> TrainState, sharded
    group: Solo  # the processes of the run
    evaluation_due: bool = False  # that of the restored step was cut short

    def fingerprint(self) -> dict[str, Any]:
        """What must agree for the data of a resumed run to continue the old data."""
        return {
            "corpus": self.corpus.fingerprint,
            "plan": self.plan.fingerprint(),
            "seed": self.cfg.seed,
            "batch_size": self.cfg.batch_size,
            "num_mixtures": self.cfg.num_mixtures,
        }

    def data_state(self, step: int) -> dict[str, Any]:
        """The `data` item of a checkpoint."""
        return {
            "step": step,
            "cursors": self.plan.cursors(step).tolist(),
            "fingerprint": self.fingerprint(),
            "evaluation_due": self.evaluation_due,
        }


def setup(
    cfg: ConfigDict,
    workdir: pathlib.Path,
    *,
    model: BaseModel | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Check everything that can be checked before work starts, and build the run.

    Args:
      model: the base network, if it is not the config's.
      devices: to train on; default: all of all processes.

    Raises:
      UserError: config, corpus, mesh or workdir do not fit each other.
    """
    config_lib.check(cfg)
    trackers.find(cfg.log.trackers)
    corpus = open_corpus(cfg.corpus.dir)
    loader.check_corpus(
        corpus, num_domains=cfg.num_domains, seq_len=cfg.seq_len, vocab_size=cfg.vocab_size
    )
    mesh = build.make_mesh(cfg, devices)
    meta = domain_weights.from_config(cfg, corpus.domain_frequencies)
    plan = SamplingPlan(
        meta,
        num_windows_K=np.diff(corpus.offsets["train"]),
        batch_size=cfg.batch_size,
        num_mixtures=cfg.num_mixtures,
        seed=cfg.seed,
    )
    model = model or build.base_model(cfg)
    if cfg.mesh.gather == "layer" and model.with_gather is None:
        raise UserError(
            "mesh.gather = 'layer', but this network cannot gather its own layers: set "
            "--config.mesh.gather=step, or give its BaseModel a `with_gather`"
        )
    optimizer = build.optimizer_config(cfg)
    make = make_init(
        build.soup_config(cfg),
        optimizer,
        model,
        seed=cfg.seed,
        frequencies_K=corpus.domain_frequencies,
        centroids_KC=corpus.centroids() if cfg.router.init == "centroids" else None,
    )
    abstract = jax.eval_shape(make)
    shardings = state_shardings(mesh, abstract, optimizer)
    return Run(
        cfg=cfg,
        workdir=workdir,
        corpus=corpus,
        model=model,
        mesh=mesh,
        plan=plan,
        abstract=checkpoint_lib.abstract_with_shardings(abstract, shardings),
        init=jax.jit(make, out_shardings=shardings),
        group=distributed.current(),
    )


def claim_workdir(run: Run) -> None:
    """Write the config and the parameters' list into the workdir; only process 0 writes.

    Raises:
      UserError: it holds a run with another config, or the processes have different data or see
        different folders; the differences are listed.
    """
    timeout = run.cfg.distributed.init_timeout_secs
    path = run.workdir / "config.json"
    if path.exists():
        free = {name for name, field in config_lib.FIELDS.items() if field.change == "free"}
        changes = config_lib.diff(config_lib.load(path), run.cfg, ignore=free)
        if changes:
            raise UserError(
                f"{run.workdir} holds a run with another config (old -> new):\n  "
                + "\n  ".join(changes)
                + "\nUse the old values to continue it, or another --workdir"
            )
    # Nobody writes before everybody has compared.
    run.group.require_same("data", run.fingerprint(), timeout=timeout)
    if run.group.process_id == 0:
        run.workdir.mkdir(parents=True, exist_ok=True)
        config_lib.save(run.cfg, path)
        leaves = tree.flatten(run.abstract.params)
        lines = [f"{p} {x.dtype}{list(x.shape)} {x.sharding.spec}\n" for p, x in leaves.items()]
        (run.workdir / "parameters.txt").write_text("".join(lines), encoding="utf-8")
    if run.group.num_processes > 1:
        run.group.meet("workdir written", timeout=timeout)
        seen = {"config.json": _seen(path), "workdir": str(run.workdir.resolve())}
        run.group.require_same("workdir, which must be on a disk that all share", seen)


def _seen(path: pathlib.Path) -> str:
    for _ in range(_SEE_FILE_SECS):
        if path.exists():
            break
        time.sleep(1)
    return files.sha256_file(path) if path.exists() else "missing"


def compile_together(group: Solo, name: str, jitted: Any, *arguments: Any) -> Any:
    """`jitted`, compiled for `arguments`; with many processes, on all of them before one goes on.

    A process may take minutes longer than another, which found the code in its cache. Waiting for
    it belongs here, where a late one is named, and not in a collective with a time-out of its own.
    """
    compiled = compile_cache.compiled(name, jitted, *arguments)
    if group.num_processes == 1:
        return jitted  # jax remembers what it compiled
    group.meet(f"{name} compiled", timeout=watchdog.COMPILE_SECS)
    return compiled


def restore_or_init(run: Run, checkpointer: checkpoint_lib.Checkpointer) -> TrainState:
    """The newest checkpoint of the workdir, its data checked against the run's; else a new state.

    Raises:
      UserError: the checkpoint's structure or its data fingerprint differs; both sides are shown.
    """
    restored = checkpointer.restore(run.abstract)
    if restored is None:
        return compile_together(run.group, "init", run.init)()
    state, data = restored
    ours = run.fingerprint()
    differences = [
        f"{name}: {data['fingerprint'].get(name)!r} -> {value!r}"
        for name, value in ours.items()
        if data["fingerprint"].get(name) != value
    ]
    if differences:
        raise UserError(
            "the checkpoint was trained on other data (checkpoint -> now):\n  "
            + "\n  ".join(differences)
        )
    run.evaluation_due = bool(data.get("evaluation_due"))
    run.plan.restore(data["step"], np.asarray(data["cursors"], np.int64))
    return state
