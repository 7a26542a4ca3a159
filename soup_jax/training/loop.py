"""The training loop: sampling plan -> sharded step -> metrics, checkpoints, evaluation.

    soup-jax train --config=experiments/quickstart.py --workdir=runs/soup

The same command continues a run that was killed, and the run ends bit-identical to one that never
was. SIGTERM and SIGINT save at the current step and end with status 0; with many processes (see
`processes`) a signal at one stops all of them after the same step.
"""

import collections
import logging
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from soup_jax import tree
from soup_jax.data import loader
from soup_jax.errors import UserError
from soup_jax.evaluation import evaluator as evaluator_lib
from soup_jax.evaluation import sets as sets_lib
from soup_jax.models.base import BaseModel
from soup_jax.processes import watchdog
from soup_jax.processes.stop import stop_requests
from soup_jax.soup import Batch
from soup_jax.soup import layout as sharding
from soup_jax.storage import sha256_bytes, write_json
from soup_jax.training import build, divergence, metrics
from soup_jax.training import checkpoint as checkpoint_lib
from soup_jax.training import step as train_step
from soup_jax.training.meter import Meter
from soup_jax.training.setup import (
    Run,
    claim_workdir,
    compile_together,
    read_initial,
    restore_or_init,
    settle,
    setup,
)
from soup_jax.training.state import TrainState
from soup_jax.training.trace import traced

_log = logging.getLogger(__name__)

# Steps that the host may send before an earlier one is done: one to run, and one to follow it.
_AHEAD = 2


class Interrupted(Exception):
    """SIGTERM or SIGINT arrived; the state was saved."""


class _EvaluationCut(Exception):
    """A signal arrived during an evaluation: saving comes first."""


def train(
    cfg: ConfigDict,
    workdir: str | pathlib.Path,
    *,
    model: BaseModel | None = None,
    devices: Sequence[jax.Device] | None = None,
    accept_changes: bool = False,
) -> TrainState:
    """Train to `cfg.num_steps` and return the final state.

    Args:
      model: a base network of your own; by default the config's.
      devices: to train on; default: all of all processes.
      accept_changes: whether tunable fields may differ from those of the run in `workdir`.

    Raises:
      UserError: before work starts, for anything the user can fix.
      FloatingPointError: loss or gradient not finite; the report's path is in the message.
      Interrupted: a signal arrived; the state was saved.
    """
    run = setup(cfg, workdir, model=model, devices=devices)
    with run.lock:
        specialists, validation = _evaluation_sets(run)
        read_initial(run)
        claim_workdir(run, accept_changes=accept_changes)
        return _train(run, specialists, validation)


def _train(run: Run, specialists: list[sets_lib.SpecialistSet], validation: Any) -> TrainState:
    cfg = run.cfg
    saving = cfg.checkpoint.async_timeout_secs
    compiling = watchdog.COMPILE_SECS
    allowances = {"compiling": compiling, "saving": saving, "restoring": compiling + saving}
    allowances["compiling the evaluation"] = compiling
    limit = cfg.distributed.step_timeout_secs
    with (
        run.record.kept(),
        stop_requests(run.group),
        watchdog.watch(run.group, run.workdir, limit=limit, allowances=allowances),
        checkpoint_lib.Checkpointer(run.home.checkpoints, cfg) as checkpointer,
    ):
        state = restore_or_init(run, checkpointer)
        start = int(state.step)
        settle(run, start)
        _announce(run, start)
        writer = metrics.MetricsWriter(
            cfg, workdir=run.workdir, start_step=start, active=run.group.process_id == 0
        )
        try:
            loop = _Loop(run, checkpointer, writer, specialists, validation, start)
            state = loop.run(state, start)
            run.group.at("saving")
            return state
        finally:
            writer.close()


def _evaluation_sets(run: Run) -> tuple[list[sets_lib.SpecialistSet], Any]:
    cfg = run.cfg
    paths = sets_lib.document_sets(cfg.evaluate.specialists)  # a wrong pattern is told now
    if not cfg.evaluate.every_steps:
        return [], None
    sets = [
        sets_lib.specialist_set(name, path, run.corpus, cfg, part="tuning")
        for name, path in paths.items()
    ]
    for known in sets:
        if known.num_in_training:
            _log.warning(
                "specialist %s: %d documents are not scored, they are in the training text",
                known.name,
                known.num_in_training,
            )
    # What each process has read must be the same text: a file less here is a wait for ever there.
    read = {name: _digest(s) for name, s in zip(paths, sets)}
    run.group.require_same("evaluation sets", {"sets": read})
    validation = sets_lib.validation_set(run.corpus, max_windows=cfg.evaluate.max_windows)
    return sets, validation


def _digest(specialist: sets_lib.SpecialistSet) -> str:
    h_K, scored = specialist.histogram.h_K, specialist.scored
    return sha256_bytes(h_K.tobytes() + scored.tokens.tobytes() + scored.num_targets.tobytes())


def _announce(run: Run, start: int) -> None:
    cfg, params = run.cfg, run.abstract.params
    counts = {name: tree.num_params(part) for name, part in params.items()}
    _log.info(
        "%s: %.3gM shared parameters, %d experts (%.3gM), router %.3gM; mesh %s; "
        "%d steps x %d windows x %d tokens = %.3gM tokens; starting at step %d",
        cfg.name,
        counts["shared"] / 1e6,
        cfg.num_experts,
        counts["bank"] / 1e6,
        counts["router"] / 1e6,
        dict(run.mesh.shape),
        cfg.num_steps,
        cfg.batch_size,
        cfg.seq_len,
        cfg.num_steps * cfg.batch_size * cfg.seq_len / 1e6,
        start,
    )
    for part, leading in (("shared", 0), ("bank", 1)):
        for line in sharding.unsliced(run.mesh, params[part], leading=leading):
            _log.warning("not cut over all devices, for no dimension divides: %s/%s", part, line)


class _Loop:
    """The steps of one process, from a restored state to the last."""

    def __init__(
        self,
        run: Run,
        checkpointer: checkpoint_lib.Checkpointer,
        writer: metrics.MetricsWriter,
        specialists: list[sets_lib.SpecialistSet],
        validation: Any,
        start: int,
    ):
        self.run_, self.checkpointer, self.writer = run, checkpointer, writer
        self.specialists, self.validation, self.group = specialists, validation, run.group
        shardings = jax.tree.map(lambda a: a.sharding, run.abstract)
        self.step_fn = train_step.compile_step(run.cfg, run.model, run.mesh, shardings)
        self.evaluator = (
            evaluator_lib.Evaluator(
                build.soup_config(run.cfg),
                run.model,
                run.mesh,
                batch_size=run.cfg.evaluate.batch_size,
                sets=[*(s.scored for s in specialists), validation],
            )
            if run.cfg.evaluate.every_steps
            else None
        )
        peak = run.cfg.log.peak_tflops or metrics.peak_tflops(jax.devices()[0].device_kind)
        self.peak_flops = peak * 1e12 * run.mesh.size
        self.bar: Any = None
        self.pending: dict[str, Any] | None = None  # of the line that is written next
        self.meter = Meter(run.mesh, run.cfg.num_domains)
        self.meter.restore(run.unfinished, run.plan, step=start)
        self.sent: collections.deque[jax.Array] = collections.deque()

    def run(self, state: TrainState, start: int) -> TrainState:
        run, cfg = self.run_, self.run_.cfg
        batches = loader.batches(
            run.corpus,
            run.plan,
            rows=loader.process_rows(sharding.batch(run.mesh), cfg.batch_size),
            start_step=start,
            num_steps=cfg.num_steps,
            num_threads=cfg.loader.num_threads,
            prefetch=cfg.loader.prefetch,
        )
        meter = self.meter
        shown = sys.stderr.isatty() and self.group.process_id == 0
        self.bar = tqdm(total=cfg.num_steps, initial=start, unit="step", disable=not shown)
        with self.bar:
            self._make_up_evaluation(state, start)
            for step in traced(start, cfg, run.workdir, self._sent, meter):
                if not self.group.enter(step):
                    self._stop(state, step)
                self.group.at("reading data")
                before = time.perf_counter()
                batch = loader.to_device(self._next(batches, state, step, start), run.mesh)
                meter.feed(run.plan[step], time.perf_counter() - before)
                self.group.at("compiling" if step == start else "training")
                if step == start:
                    step_fn = compile_together(
                        self.group, "step", self.step_fn, state, meter.sums, batch
                    )
                state, meter.sums = step_fn(state, meter.sums, batch)
                done = step + 1
                self._sent(meter.sums["steps"], ahead=_AHEAD)
                if step == start:
                    meter.note_first()
                self.bar.update()
                self._log(state)  # the line before, with the next step under way
                if done % cfg.log.every_steps == 0 or done == cfg.num_steps:
                    self.pending = meter.close(done)
                if self._evaluates(done):
                    self._sent(ahead=0)
                    before = time.perf_counter()
                    self._evaluate(state, done)
                    meter.skip(time.perf_counter() - before)
                if self._saves(done):
                    self._save(state, done)
            if run.evaluation_due:
                self._stop(state, cfg.num_steps)
        if start == cfg.num_steps:
            _log.info("all %d steps are done already", cfg.num_steps)
        return state

    def _sent(self, *results: jax.Array, ahead: int) -> None:
        # The watchdog hears of each step as it ends, not as it is sent.
        self.sent.extend(results)
        while len(self.sent) > ahead:
            jax.block_until_ready(self.sent.popleft())
            self.group.at("training")

    def _next(self, batches: Iterator[Batch], state: TrainState, step: int, start: int) -> Batch:
        try:
            return next(batches)
        except UserError as e:
            if step == start or not self._keep(state, step):
                raise
            raise UserError(f"{e}. Step {step} is saved; the same command goes on from it") from e

    def _keep(self, state: TrainState, done: int) -> bool:
        # With many processes the others, which may go on, would have to save with this one.
        if self.group.num_processes > 1:
            return False
        self._save(state, done)
        self.checkpointer.wait()
        return True

    def _saves(self, done: int) -> bool:
        every = self.run_.cfg.checkpoint.every_steps
        return done == self.run_.cfg.num_steps or bool(every and done % every == 0)

    def _evaluates(self, done: int) -> bool:
        every = self.run_.cfg.evaluate.every_steps
        due = bool(every) and (done % every == 0 or done == self.run_.cfg.num_steps)
        return due and self.evaluator is not None

    def _check_finite(self, state: TrainState) -> None:
        bad = int(state.bad_step)
        if bad < 0:
            return
        report = divergence.report(self.run_, bad)
        name = f"nonfinite_{bad}.json"
        if self.group.process_id == 0:
            write_json(self.run_.workdir / name, report)
        self.run_.publish()
        # The step froze the state before this update, so what is saved here is sound.
        meter = {"first_loss": self.meter.first_loss}
        self.checkpointer.save(state, {**self.run_.data_state(bad), "meter": meter})
        self.checkpointer.wait()
        labels = ", ".join(d["label"] for d in report["domains"].values())
        raise FloatingPointError(
            f"loss or gradient of step {bad} is not finite (domains: {labels}); its domain weights "
            f"and windows are in {self.run_.home.place}/{name}, the state before it is saved in "
            f"{self.checkpointer.directory}.\n"
            + divergence.advice(self.run_, bad, saved=self.checkpointer.steps())
        )

    def _check_growth(self, done: int, line: dict[str, Any]) -> None:
        limit, reason = divergence.limit(self.run_.cfg.vocab_size, self.meter.first_loss)
        if line["loss"] > limit:
            raise FloatingPointError(
                f"the loss of the {line['steps']} steps before step {done} is {line['loss']:.4g} "
                f"nats, more than {limit:.4g} ({reason}): the run diverged.\n"
                + divergence.earlier(self.run_, done, saved=self.checkpointer.steps())
            )

    def _save(self, state: TrainState, done: int) -> None:
        self._sent(ahead=0)
        self._log(state)  # the next start makes no line of these steps; and it may have diverged
        self._check_finite(state)
        self.group.at("saving", done)
        self.run_.publish()  # before it: a save whose lines are missing would stay without them
        self.checkpointer.save(state, {**self.run_.data_state(done), "meter": self.meter.state()})
        self.group.at("training")

    def _stop(self, state: TrainState, done: int) -> None:
        self._save(state, done)
        self.group.at("saving")
        self.checkpointer.wait()
        raise Interrupted(
            f"{self.group.stop_reason}: saved step {done} of {self.run_.cfg.num_steps} in "
            f"{self.checkpointer.directory}; the same command continues"
        )

    def _poll(self) -> None:
        self.group.at("evaluating")
        # With many processes the stop comes after it: they would have to agree on the batch.
        if self.group.stop_reason and self.group.num_processes == 1:
            raise _EvaluationCut

    def _log(self, state: TrainState) -> None:
        # Of the interval that was closed last, if its line is not written yet.
        cfg, pending, self.pending = self.run_.cfg, self.pending, None
        if pending is None:
            return
        jax.block_until_ready(pending["sums"])
        line = metrics.summarize(
            pending["sums"], seconds=self.meter.lap(), wait_seconds=pending["wait"]
        )
        if int(pending["sums"]["bad_step"]) >= 0:
            self._check_finite(state)
        self._check_growth(pending["step"], line)
        line["batch_hash"] = pending["hash"]
        line["tokens"] = pending["step"] * cfg.batch_size * cfg.seq_len
        line["epochs_max"] = int(self.run_.plan[pending["step"] - 1].epoch_B.max())
        if self.peak_flops and self.run_.model.flops_per_row:
            rows = line["tokens_per_second"] / cfg.seq_len
            line["mfu"] = rows * self.run_.model.flops_per_row / self.peak_flops
        self.writer.write(pending["step"], line)
        text = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tok/s"
        if self.bar is None or self.bar.disable:
            _log.info("step %d/%d  %s", pending["step"], cfg.num_steps, text)
        else:
            self.bar.set_postfix_str(text)

    def _make_up_evaluation(self, state: TrainState, start: int) -> None:
        # Process 0 has the metrics: a later start than the cut one may have evaluated already.
        due, _ = self.group.meet("evaluation", {"made": self.writer.has(start, "evaluation")})
        if self.run_.evaluation_due and self.evaluator is not None and not due["made"]:
            self._evaluate(state, start)
        else:
            self.run_.evaluation_due = False

    def _evaluate(self, state: TrainState, done: int) -> None:
        assert self.evaluator is not None
        self.group.at("compiling the evaluation")
        self.run_.evaluation_due = True
        try:
            result = evaluator_lib.evaluate(
                self.evaluator,
                state.params,
                self.run_.corpus.domain_frequencies,
                specialists=self.specialists,
                validation=self.validation,
                between=self._poll,
            )
        except _EvaluationCut:
            _log.warning("evaluation of step %d cut short by a signal", done)
            return
        except jax.errors.JaxRuntimeError:  # no room for its batch, most likely
            self._keep(state, done)
            raise
        self.run_.evaluation_due = False
        self.group.at("training")
        self.writer.write(done, result, kind="evaluation")
        averages = {c: v["loss"] for c, v in result["average"].items()}
        for column, value in result["generic_validation"].items():
            averages[f"generic_validation_{column}"] = value["loss"]
        _log.info("step %d evaluation: %s", done, {k: round(v, 4) for k, v in averages.items()})
