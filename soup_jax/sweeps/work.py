"""The work of a sweep: which points are trained, by whom, and how each ended."""

import logging
import os
import pathlib
import shlex
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from soup_jax import inputs, remote
from soup_jax import storage as files
from soup_jax.config import schema as config_lib
from soup_jax.data import corpus as corpus_lib
from soup_jax.data import loader
from soup_jax.errors import UserError, explain
from soup_jax.evaluation import sets
from soup_jax.sweeps import pool, table
from soup_jax.sweeps.points import Point, Sweep
from soup_jax.training import build, changes
from soup_jax.training import workdir as workdir_lib

_log = logging.getLogger(__name__)

# A worker whose sweep was killed saves, and then leaves its point.
_LEAVE_SECS = 120
_MAX_ERROR = 240  # characters; the log has the rest

# Of evaluate.*: what changes no score.
_NOT_SCORING = ("specialists", "every_steps", "batch_size")
_MAP = {"fingerprint": str}

Pairs = Sequence[tuple[Point, ConfigDict]]


def check_evaluations(pairs: Pairs, *, evaluate: bool, metric: str) -> None:
    """Refuse what only an evaluation gives, where there will be none.

    Raises:
      UserError: names the point.
    """
    of_specialists = evaluate or metric not in ("", "loss", "validation")
    for point, cfg in pairs:
        what = "--evaluate" if evaluate else f"--metric={metric}"
        if of_specialists and not cfg.evaluate.specialists:
            raise UserError(
                f"{what}, but {point.name} has no evaluate.specialists: set "
                "--config.evaluate.specialists=FILES"
            )
        if metric not in ("", "loss") and not (evaluate or cfg.evaluate.every_steps):
            raise UserError(
                f"{what}, but {point.name} is never evaluated: add --evaluate, or set "
                "--config.evaluate.every_steps"
            )


def check_runs(pairs: Pairs, workdir: pathlib.Path) -> None:
    """Refuse, before the first starts, points whose run would be refused.

    Raises:
      UserError: names the point: its folder holds a run with another config or of another corpus,
        its corpus or documents are not there or do not fit, or its soup or optimizer is none.
    """
    jax.config.update("jax_platforms", "cpu")  # this process leaves the devices to its workers
    seen: dict[tuple[Any, ...], Any] = {}
    for point, cfg in pairs:
        try:
            changes.compare(workdir_lib.at(workdir / point.name), cfg, accept=False)
            build.soup_config(cfg)
            build.optimizer_config(cfg)
            key = (cfg.corpus.dir, cfg.num_domains, cfg.corpus.cache_dir)
            if key not in seen:
                seen[key] = corpus_lib.open_corpus(key[0], num_domains=key[1], cache_dir=key[2])
            sizes = {n: cfg[n] for n in ("num_domains", "seq_len", "vocab_size")}
            loader.check_corpus(seen[key], **sizes)
            _check_same_corpus(workdir / point.name, seen[key])
            if cfg.evaluate.specialists not in seen:
                seen[cfg.evaluate.specialists] = sets.document_sets(cfg.evaluate.specialists)
        except UserError as e:
            raise UserError(f"point {point.name}: {e}") from e


def _check_same_corpus(folder: pathlib.Path, corpus: corpus_lib.Corpus) -> None:
    about = folder / "domains" / "map.json"  # of a run that has started
    if about.exists() and inputs.read_json(about, _MAP)["fingerprint"] != corpus.fingerprint:
        raise UserError(
            f"{folder} holds a run of another corpus than {corpus.path} is now: set corpus.dir to "
            "that one, or give another --workdir"
        )


def scoring(cfg: ConfigDict) -> str:
    """A hash of what the score of a config's run depends on beside the run: the documents, by
    place and length, and the fields of `evaluate`.

    Raises:
      UserError: there are no such documents.
    """
    found = sets.document_sets(cfg.evaluate.specialists)
    documents = {
        name: [path] if remote.is_object(path) else [os.path.realpath(path), os.path.getsize(path)]
        for name, path in found.items()
    }
    text = files.json_text({"documents": documents, **_scoring_fields(cfg)})
    return files.sha256_bytes(text.encode())[:16]


def _scoring_fields(cfg: ConfigDict) -> dict[str, Any]:
    fields = config_lib.flat_items(cfg.evaluate)
    return {name: value for name, value in fields if name not in _NOT_SCORING}


class Work:
    """A pool at work on a sweep's points, and what it tells of them."""

    def __init__(
        self,
        sweep: Sweep,
        workdir: pathlib.Path,
        *,
        worker: str,
        evaluate: bool,
        retry_failed: bool,
    ):
        """`worker` is the module of the workers' processes."""
        self.sweep, self.workdir, self.worker = sweep, workdir, worker
        self.evaluate, self.retry_failed = evaluate, retry_failed
        self.begun: dict[str, tuple[float, int]] = {}  # time, and length of the log
        self.num_ended = self.num_jobs = 0
        self.num_steps: dict[str, int] = {}
        self.errors: dict[str, str] = {}  # of points whose start or end could not be noted

    def run(self, pairs: Pairs, *, jobs: int) -> str:
        """Train what has not ended, `jobs` at a time as `pool.slots` takes it; returns the name of
        the signal that stopped it, or "".

        Raises:
          UserError: too many at a time, or a point that another process trains.
        """
        todo = [job for point, cfg in pairs if (job := self._job(point, cfg))]
        self.num_jobs = len(todo)
        if len(pairs) > len(todo):
            _log.info("%d of %d points have ended before", len(pairs) - len(todo), len(pairs))
        if not todo:
            return ""
        devices = max(cfg.mesh.num_devices for _, cfg in pairs)
        slots = pool.slots(jobs, len(todo), devices_per_job=devices)
        _log.info("%d at a time", len(slots))
        _wait_until_free([job.log.parent for job in todo])
        workers = pool.Pool(slots, self.worker)
        workers.run(todo, started=self._started, ended=self._ended)
        self._note(workers.errors)
        return workers.stopped

    def _job(self, point: Point, cfg: ConfigDict) -> pool.Job | None:
        folder = self.workdir / point.name
        ended = table.outcome(folder)
        state = ended["state"]
        words = [*self.sweep.train, *point.arguments, f"--workdir={folder}"]
        train = ["train", *words, "--distributed=off"]
        commands = []
        if state != "done" and (state != "failed" or self.retry_failed):
            commands.append(train)
        current = ended["scoring"] == self.sweep.scoring.get(point.name, "")
        scored = current and table.scored_step(folder) == cfg.num_steps
        if self.evaluate and not scored and (commands or state == "done"):
            # `evaluate` takes what config.json says, which `train` brings up to date.
            config = folder / "config.json"
            saved = config_lib.load(config) if config.exists() else cfg
            if not commands and _scoring_fields(saved) != _scoring_fields(cfg):
                commands.append(train)
            documents = [f"--specialists={pattern}" for pattern in cfg.evaluate.specialists]
            at = [f"--workdir={folder}", f"--step={cfg.num_steps}"]
            commands.append(["evaluate", *at, "--part=tuning", *documents])
        if not commands:
            return None
        self.num_steps[point.name] = cfg.num_steps
        needs = str(_last_checkpoint(folder, cfg.num_steps))
        text = config_lib.to_text(cfg)
        return pool.Job(point.name, commands, folder / "log.txt", needs, text)

    def _note(self, errors: Mapping[str, Exception]) -> None:
        for name, e in errors.items():
            told = str(e) if isinstance(e, UserError) else explain(e)
            error = told or f"{type(e).__name__}: {e}"
            _log.warning("%s: FAILED: %s", name, error)
            try:
                table.record(self.workdir / name, state="failed", seconds=0.0, error=error)
            except (UserError, OSError):  # what is wrong there is what has been told
                self.errors[name] = error

    def _started(self, job: pool.Job) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        if job.commands[-1][0] == "evaluate":
            (job.log.parent / table.SCORE).unlink(missing_ok=True)  # of other settings or steps
        with job.log.open("a", encoding="utf-8") as log:
            for words in job.commands:
                log.write(f"+ {shlex.join(['soup-jax', *words])}\n")
            self.begun[job.name] = time.perf_counter(), log.tell()
        _log.info("%s: started", job.name)

    def _ended(self, job: pool.Job, status: int) -> None:
        start, length = self.begun[job.name]
        seconds, folder = time.perf_counter() - start, job.log.parent
        trained = _last_checkpoint(folder, self.num_steps[job.name]).is_dir()
        evaluated = job.commands[-1][0] == "evaluate"
        self.num_ended += 1
        where = f"{self.num_ended} of {self.num_jobs}"
        if status == 0 and not trained:
            _log.info("%s: %s, stopped by a signal in %.0f s", where, job.name, seconds)
        elif status == 0:
            scoring = self.sweep.scoring.get(job.name, "") if evaluated else ""
            table.record(folder, state="done", seconds=seconds, scoring=scoring)
            _log.info("%s: %s, done in %.0f s", where, job.name, seconds)
        elif trained and evaluated:
            error = f"evaluation failed: {_reason(job.log, length, status)}"
            table.record(folder, state="done", seconds=seconds, error=error)
            _log.warning("%s: %s, trained in %.0f s, %s", where, job.name, seconds, error)
        else:
            error = _reason(job.log, length, status)
            table.record(folder, state="failed", seconds=seconds, error=error)
            _log.warning("%s: %s, FAILED in %.0f s: %s", where, job.name, seconds, error)


def _last_checkpoint(folder: pathlib.Path, num_steps: int) -> pathlib.Path:
    return folder / "checkpoints" / str(num_steps)


def _reason(log: pathlib.Path, start: int, status: int) -> str:
    # The last words of a job, or the signal that its worker died of.
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + " (out of memory, perhaps)" * (name == "SIGKILL")
    with log.open("rb") as f:
        f.seek(max(start, log.stat().st_size - (1 << 16)))
        lines = [x.strip() for x in f.read().decode("utf-8", "replace").splitlines() if x.strip()]
    told = [line for line in lines if line.startswith("soup-jax: error: ")]
    last = (told or lines or [f"ended with status {status}"])[-1]
    error = last.removeprefix("soup-jax: error: ")
    return error if len(error) <= _MAX_ERROR else f"{error[:_MAX_ERROR]}..."


def _wait_until_free(folders: Sequence[pathlib.Path]) -> None:
    end, told = time.monotonic() + _LEAVE_SECS, False
    for folder in folders:
        while folder.exists():
            try:
                with files.locked(folder, "it is being trained"):
                    break
            except UserError:
                if time.monotonic() > end:
                    raise UserError(
                        f"another process trains {folder}: wait for it, or end it"
                    ) from None
                if not told:
                    _log.info("waiting for the process that trains %s", folder)
                told = True
                time.sleep(0.5)
