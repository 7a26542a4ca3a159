"""A training run, set up and checked before its first step.

The state comes from the newest checkpoint of the workdir; without one, parameters come from the run
or model `checkpoint.init_from`; without that, from the config's seed. Set-up compares config,
corpus, mesh, workdir and checkpoint with each other, and refuses any mismatch with both sides
shown.
"""

import contextlib
import dataclasses
import logging
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import inputs, places, remote, tree
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.data import loader
from soup_jax.data.corpus import Corpus, open_corpus
from soup_jax.data.prepare import provenance
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.hardware import compile_cache
from soup_jax.models.base import BaseModel
from soup_jax.processes import start as distributed
from soup_jax.processes import watchdog
from soup_jax.processes.group import Solo
from soup_jax.shapes import Params
from soup_jax.soup import layout
from soup_jax.training import build, pretrained, starts, trackers
from soup_jax.training import changes as changes_lib
from soup_jax.training import checkpoint as checkpoint_lib
from soup_jax.training import workdir as workdir_lib
from soup_jax.training.state import (
    TrainState,
    abstract_with_shardings,
    state_shardings,
)
from soup_jax.training.workdir import Workdir

_log = logging.getLogger(__name__)

# A network file system may remember for so long that a file was not there.
_SEE_FILE_SECS = 60


@dataclasses.dataclass
class Run:
    """What a training run is made of, set up before the first step."""

    cfg: ConfigDict
    home: Workdir
    corpus: Corpus
    model: BaseModel
    mesh: Mesh
    plan: SamplingPlan
    abstract: TrainState  # with shardings: the target of a restore
    make: Any  # seed -> TrainState, not compiled
    init: Any  # () -> TrainState, sharded
    group: Solo  # the processes of the run
    evaluation_due: bool = False  # that of the restored step was cut short
    lock: contextlib.ExitStack = dataclasses.field(default_factory=contextlib.ExitStack)
    unfinished: Any = None  # the metrics since the last line, of the restored step
    changes: changes_lib.Changes = dataclasses.field(default_factory=dict)  # since the last start
    initial: Params = dataclasses.field(default_factory=dict)  # parts from checkpoint.init_from
    record: starts.Record = dataclasses.field(default_factory=starts.Record)

    @property
    def workdir(self) -> pathlib.Path:
        """The folder of all that is no checkpoint."""
        return self.home.path

    def publish(self) -> None:
        """Let others see what process 0 has written."""
        if self.group.process_id == 0:
            self.record.update()
            self.home.publish()

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
        index = self.plan.index(step)
        return {
            "step": step,
            "plan_step": index,
            "cursors": self.plan.cursors(index).tolist(),
            "fingerprint": self.fingerprint(),
            "evaluation_due": self.evaluation_due,
        }


def setup(
    cfg: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    model: BaseModel | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> Run:
    """Check everything that can be checked before work starts, and build the run.

    Close its `lock` when it is done: what lies here of a run in a bucket is removed then.

    Args:
      model: the base network, if it is not the config's.
      devices: to train on; default: all of all processes.

    Raises:
      UserError: config, corpus, mesh or workdir do not fit each other.
    """
    config_lib.check(cfg)
    group = distributed.current()
    group.restart_clock()
    with contextlib.ExitStack() as lock:
        home = workdir_lib.at(workdir)
        lock.callback(home.close)
        run = _build(cfg, home, group, model, devices)
        run.lock = lock.pop_all()
        return run


def _build(
    cfg: ConfigDict,
    home: Workdir,
    group: Solo,
    model: BaseModel | None,
    devices: Sequence[jax.Device] | None,
) -> Run:
    new = not (home.path / "config.json").exists()
    _check_new(new, config_lib.check_start, cfg)
    trackers.find(cfg.log.trackers)
    corpus = open_corpus(
        cfg.corpus.dir, num_domains=cfg.num_domains, cache_dir=cfg.corpus.cache_dir
    )
    loader.check_corpus(
        corpus, num_domains=cfg.num_domains, seq_len=cfg.seq_len, vocab_size=cfg.vocab_size
    )
    for warning in provenance.check_against(cfg, corpus) if new else ():
        _log.warning("%s", warning)
    _check_new(new, provenance.check_weights, cfg.domain_weights.path, corpus)
    mesh = build.make_mesh(cfg, devices)
    plan = build.sampling_plan(cfg, corpus)
    model = model or build.base_model(cfg)
    if cfg.mesh.gather == "layer" and model.with_gather is None:
        raise UserError(
            "mesh.gather = 'layer', but this network cannot gather its own layers: set "
            "--config.mesh.gather=step, or give its BaseModel a `with_gather`"
        )
    if cfg.model.attention_reset >= 0 and cfg.model.kind != "llama":
        _log.warning(
            "model.attention_reset is obeyed by the network alone: %s gets it in its ModelSettings",
            cfg.model.kind,
        )
    make = build.initial_state(cfg, model, corpus)
    abstract = jax.eval_shape(make)
    _check_new(new, build.check_rules, cfg, abstract.params)
    shardings = state_shardings(mesh, abstract, build.optimizer_config(cfg))
    return Run(
        cfg=cfg,
        home=home,
        corpus=corpus,
        model=model,
        mesh=mesh,
        plan=plan,
        abstract=abstract_with_shardings(abstract, shardings),
        make=make,
        init=_seeded(make, cfg, mesh, shardings),
        group=group,
    )


def _seeded(make: Any, cfg: ConfigDict, mesh: Mesh, shardings: Any) -> Any:
    # Earlier versions let larger seeds through, which jax cut.
    seed = np.uint32(cfg.seed % (1 << 32))
    jitted = jax.jit(make, out_shardings=shardings)
    return compile_cache.Bound(jitted, seed, layout.replicated(mesh))


def _check_new(new: bool, check: Callable[..., None], *arguments: Any) -> None:
    # Earlier versions started runs that are refused today: these go on.
    try:
        check(*arguments)
    except UserError as e:
        if new:
            raise
        _log.warning("%s. A new run is refused for this; the one in this folder goes on", e)


def read_initial(run: Run) -> None:
    """Read the parameters of `checkpoint.init_from`, unless the workdir has a checkpoint.

    Of a run they are all; of one without experts, whose soup this becomes, and of a model of
    transformers, the shared ones.

    Raises:
      UserError: no run, checkpoint or model there, or its parameters have another structure.
    """
    cfg = run.cfg.checkpoint
    if not cfg.init_from:
        return
    with checkpoint_lib.Checkpointer(run.home.checkpoints) as own:
        lead, _ = run.group.meet("own checkpoints", {"steps": own.steps()})
    if lead["steps"]:
        return
    files.refuse_address(cfg.init_from, "checkpoint.init_from", objects=True)
    source = places.local(cfg.init_from, models=True)
    address = remote.spelled(cfg.init_from).rstrip("/") if remote.is_object(cfg.init_from) else ""
    config = source / "config.json"
    if not config.exists():
        raise UserError(
            f"checkpoint.init_from = {source} is not a run, and no model of transformers: it has "
            "no config.json"
        )
    origin: dict[str, Any] = {"config": inputs.sha256_file(config)}
    if pretrained.is_pretrained(source):
        if cfg.init_step:
            raise UserError(
                f"checkpoint.init_step = {cfg.init_step} is a step of a run, and {source} is a "
                "model of transformers: leave it out"
            )
        shared = run.abstract.params["shared"]
        run.initial = {"shared": pretrained.read(source, run.cfg, shared, run.corpus)}
        origin |= {"model": address or str(source.absolute())}
    else:
        with checkpoint_lib.Checkpointer(places.checkpoints(cfg.init_from)) as reader:
            wanted = cfg.init_step or None
            parts, own = run.abstract.params, run.cfg.num_experts
            if own and not inputs.read_json(config, {"num_experts": int})["num_experts"]:
                parts = {name: x if name == "shared" else {} for name, x in parts.items()}
                pretrained.warn(source / "domains", run.cfg, run.corpus)
            found, step = reader.restore_params(parts, step=wanted)
            run.initial = {name: x for name, x in found.items() if parts[name]}
            corpus = reader.data(step)["fingerprint"]["corpus"]
        if corpus != run.corpus.fingerprint:
            _log.warning("%s was trained on another corpus: its domains meant other text", source)
        origin |= {"run": address or str(source.absolute()), "step": step}
    run.changes = {"checkpoint.init_from": ("", origin)}


def claim_workdir(run: Run, *, accept_changes: bool = False) -> None:
    """Lock the workdir until `run.lock` is closed, and write the config and the parameters' list
    into it; only process 0 writes.

    A config with accepted changes is written by `settle`, once their step is known.

    Raises:
      UserError: it cannot be written, another training is at work in it, the disk has no room for a
        checkpoint, it holds a run with another config, or the processes have different data or see
        different folders; the differences are listed.
    """
    timeout = run.cfg.distributed.init_timeout_secs
    path = run.workdir / "config.json"
    if run.group.process_id == 0:
        size = tree.num_bytes((run.abstract.params, run.abstract.opt_state))
        run.lock.enter_context(run.home.claimed(size))
    changes = changes_lib.compare(run.home, run.cfg, accept=accept_changes)
    run.changes = {**run.changes, **changes}
    # Nobody writes before everybody has compared.
    run.group.require_same("data", run.fingerprint(), timeout=timeout)
    if run.group.process_id == 0:
        if not changes and not _says(path, run.cfg):
            config_lib.save(run.cfg, path)
        if not (run.workdir / "domains").exists():  # specialists need no more of the corpus
            run.corpus.copy_to(run.workdir / "domains")
        leaves = tree.flatten(run.abstract.params)
        lines = [f"{p} {x.dtype}{list(x.shape)} {x.sharding.spec}\n" for p, x in leaves.items()]
        listing, text = run.workdir / "parameters.txt", "".join(lines)
        if not listing.exists() or _bytes(listing) != text.encode():
            files.write_text(listing, text)
        run.home.publish()
    if run.group.num_processes > 1:
        run.group.meet("workdir written", timeout=timeout)
        if run.group.process_id:
            run.home.refresh()
        seen = {"config.json": _seen(path), "workdir": run.home.same()}
        run.group.require_same("workdir, which must be on a disk that all share", seen)


def _bytes(path: pathlib.Path) -> bytes:
    with inputs.open_file(path) as f:
        return f.read()


def _says(path: pathlib.Path, cfg: ConfigDict) -> bool:
    return path.exists() and not config_lib.diff(config_lib.load(path), cfg)


def settle(run: Run, start: int) -> None:
    """Record this start, the run's changes, which hold from its step `start` on, and its config.

    Raises:
      UserError: they change what was done before that step.
    """
    changes_lib.check(run.changes, start=start)
    if run.group.process_id == 0:
        changes_lib.record(run.workdir, run.changes, start=start)
        if run.changes:
            config_lib.save(run.cfg, run.workdir / "config.json")
        run.record.begin(run.workdir, run.group, step=start)
        run.home.publish()


def _seen(path: pathlib.Path) -> str:
    for _ in range(_SEE_FILE_SECS):
        if path.exists():
            break
        time.sleep(1)
    return inputs.sha256_file(path) if path.exists() else "missing"


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
    """The newest checkpoint of the workdir, its data checked against the run's; else a new state,
    with the parameters that `read_initial` read, if it did.

    Raises:
      UserError: the checkpoint's structure or its data fingerprint differs; both sides are shown.
    """
    restored = checkpointer.restore(run.abstract)
    if restored is None:
        return _init(run)
    state, data = restored
    ours, theirs = run.fingerprint(), data.get("fingerprint", {})
    differences = [
        f"{name}: {theirs.get(name)!r} -> {value!r}"
        for name, value in ours.items()
        if theirs.get(name) != value
    ]
    if differences:
        raise UserError(
            "the checkpoint was trained on other data (checkpoint -> now):\n  "
            + "\n  ".join(differences)
        )
    run.evaluation_due = bool(data.get("evaluation_due"))
    run.unfinished = data.get("meter")
    # The first version left out no batches.
    index = data.get("plan_step", data["step"])
    cursors_K = np.asarray(data.get("cursors", ()), np.int64)
    if cursors_K.shape != (run.cfg.num_domains,) or (cursors_K < 0).any():
        raise UserError(
            f"the data item of checkpoint {checkpointer.directory}/{data['step']} is damaged: it "
            f"has {len(cursors_K)} cursors for {run.cfg.num_domains} domains. Delete that folder "
            "to go on from the checkpoint before"
        )
    run.plan.restore(index, cursors_K)
    return state


def _init(run: Run) -> TrainState:
    if not run.initial:
        return compile_together(run.group, "init", run.init)()

    # Only the rest: parameters that are replaced at once would need their memory all the same.
    def rest(state: TrainState) -> TrainState:
        return state._replace(
            params={name: part for name, part in state.params.items() if name not in run.initial}
        )

    shardings = jax.tree.map(lambda a: a.sharding, rest(run.abstract))
    init = _seeded(lambda seed: rest(run.make(seed)), run.cfg, run.mesh, shardings)
    state = compile_together(run.group, "init", init)()
    return state._replace(params={**state.params, **run.initial})
