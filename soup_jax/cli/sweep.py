"""`soup-jax sweep`: many runs of one config that differ in some fields.

    soup-jax sweep --config=experiments/minipile.py --workdir=sweeps/rate \\
        --sweep.optimizer.learning_rate=3e-3,5.5e-3,1e-2 --sweep.seed=0,1

trains the product of the axes, or the points that `get_sweep()` of the config file lists, or the
product of both. The same command goes on: what is finished is not trained again.
"""

import inspect
import logging
import os
import pathlib
import re
import runpy
import shlex
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from soup_jax import storage as files
from soup_jax.cli import config_flag
from soup_jax.errors import UserError

_log = logging.getLogger(__name__)

_WORKER = "soup_jax.cli.sweep_worker"
_METRICS = ("specialist", "validation", "loss", "generic_h", "shared")
# A worker whose sweep was killed saves, and then leaves its point.
_LEAVE_SECS = 120


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags, --sweep.FIELD for the fields that argv names among them."""
    config_flag.define(values, argv)
    string, boolean = flags.DEFINE_string, flags.DEFINE_bool
    string("workdir", "", "the sweep's folder, continued if it holds one", flag_values=values)
    flags.DEFINE_integer(
        "jobs",
        0,
        "runs at a time, each on cores or GPUs of its own; 0: as many as there are cores or GPUs",
        lower_bound=0,
        flag_values=values,
    )
    string("shard", "", "i/n: train every n-th point from the i-th on", flag_values=values)
    boolean(
        "evaluate",
        False,
        "score finished points on the part `tuning` of evaluate.specialists",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "metric",
        None,
        list(_METRICS),
        "what the table is sorted by; default: the first of them that all finished points have",
        flag_values=values,
    )
    boolean("retry_failed", False, "train points that failed again", flag_values=values)
    boolean("table", False, "train nothing: print how the sweep stands", flag_values=values)
    boolean("dry_run", False, "print the points, write nothing", flag_values=values)
    for name in dict.fromkeys(re.findall(r"^--?(sweep\.[^=]+)", "\n".join(argv), re.MULTILINE)):
        string(name, None, "values of a field, with commas", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Train what is to be trained, print the table; returns the exit status, 1 if a point failed."""
    from soup_jax.sweeps import points

    if not values.workdir:
        raise UserError("--workdir=DIR is required: the folder of the sweep")
    workdir = pathlib.Path(os.path.normpath(values.workdir))
    files.check_folder_target(values.workdir, "--workdir")
    if values.table:
        return _tell(points.load(workdir), workdir, values.metric or "")
    cfg = config_flag.checked(values)
    shard = _shard(values.shard)
    pairs = points.check(cfg, points.product(_listed(values), _axes(values)))
    common = [points.argument(n, v) for n, v in _common(values).items()]
    train = [f"--config={_file(values)}", *common]
    print(f"{len(pairs)} points")
    if values.dry_run:
        for point, _ in pairs:
            words = ["soup-jax", "train", *train, *point.arguments]
            print(shlex.join([*words, f"--workdir={workdir / point.name}"]))
        return 0
    given = ["soup-jax", "sweep", *train, f"--workdir={values.workdir}"]
    given += [f"--{name}={values[name].value}" for name in _axis_flags(values)]
    _check_evaluations(pairs, evaluate=values.evaluate, metric=values.metric or "")
    _check_runs(pairs, workdir)
    names = [point.name for point, _ in pairs]
    before = points.load(workdir) if (workdir / "sweep.json").exists() else None
    known = [*before.earlier, *(p.name for p in before.points)] if before else []
    earlier = [name for name in dict.fromkeys(known) if name not in names]
    if earlier:
        _log.info("no longer in the sweep, and left alone: %s", "; ".join(earlier))
    sweep = points.Sweep(given, train, [point for point, _ in pairs], earlier)
    workdir.mkdir(parents=True, exist_ok=True)
    refusal = f"another `soup-jax sweep` is at work in {workdir}"
    with files.locked(workdir, refusal, shared=shard is not None):
        points.save(sweep, workdir)
        mine = pairs[shard[0] :: shard[1]] if shard else pairs
        stopped = _Training(sweep, workdir, values).run(mine)
        if stopped:
            print(f"soup-jax: {stopped}: saved; the same command continues")
            return 0
        return _tell(sweep, workdir, values.metric or "", only=mine if shard else None)


def _shard(text: str) -> tuple[int, int] | None:
    from soup_jax.cli.prepare import shard

    return shard(text)


def _file(values: flags.FlagValues) -> str:
    return config_flags.get_config_filename(values["config"])


def _common(values: flags.FlagValues) -> dict[str, Any]:
    # In the values of the config, which has made floats of integers.
    names = config_flags.get_override_values(values["config"])
    cfg: ConfigDict = values.config
    return {name: _at(cfg, name) for name in names}


def _at(cfg: Any, name: str) -> Any:
    for part in name.split("."):
        cfg = cfg[part]
    return cfg


def _axis_flags(values: flags.FlagValues) -> list[str]:
    return [name for name in values if name.startswith("sweep.") and values[name].present]


def _axes(values: flags.FlagValues) -> dict[str, list[Any]]:
    from soup_jax.sweeps import points

    axes = {}
    for flag in _axis_flags(values):
        name = flag.removeprefix("sweep.")
        axes[name] = points.axis(name, values[flag].value)
    return axes


def _listed(values: flags.FlagValues) -> list[dict[str, Any]]:
    # What the file's get_sweep() returns; one point that changes nothing without one.
    path, _, text = _file(values).partition(":")
    try:
        get = runpy.run_path(path).get("get_sweep")
        if get is None:
            if not _axis_flags(values):
                raise UserError(
                    "nothing is swept: give --sweep.FIELD=VALUE,VALUE,... once or more, or write a "
                    f"get_sweep() into {path} that returns a list of overrides"
                )
            return [{}]
        takes = bool(text) and bool(inspect.signature(get).parameters)
        found = get(text) if takes else get()
    except UserError:
        raise
    except Exception as e:
        where = config_flag.explain(e, [f"--config={path}"])
        raise UserError(where or f"{path}: get_sweep(): {type(e).__name__}: {e}") from e
    good = isinstance(found, list | tuple) and all(isinstance(x, Mapping) for x in found)
    if not good or not found or not all(isinstance(name, str) for x in found for name in x):
        raise UserError(
            f"{path}: get_sweep() must return a list of overrides, such as "
            f'[{{"optimizer.learning_rate": 0.003}}], not {found!r:.80}'
        )
    return [dict(x) for x in found]


Pairs = Sequence[tuple[Any, ConfigDict]]


def _check_evaluations(pairs: Pairs, *, evaluate: bool, metric: str) -> None:
    for point, cfg in pairs:
        if evaluate and not cfg.evaluate.specialists:
            raise UserError(
                f"--evaluate, but {point.name} has no evaluate.specialists: set "
                "--config.evaluate.specialists=FILES"
            )
        if metric not in ("", "loss") and not (evaluate or cfg.evaluate.every_steps):
            raise UserError(
                f"--metric={metric}, but {point.name} is never evaluated: add --evaluate, or set "
                "--config.evaluate.every_steps"
            )


def _check_runs(pairs: Pairs, workdir: pathlib.Path) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # this process leaves the devices to its workers
    from soup_jax.data import corpus as corpus_lib
    from soup_jax.data import loader
    from soup_jax.evaluation import sets
    from soup_jax.training import build, changes
    from soup_jax.training import workdir as workdir_lib

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
            if cfg.evaluate.specialists not in seen:
                seen[cfg.evaluate.specialists] = sets.document_sets(cfg.evaluate.specialists)
        except UserError as e:
            raise UserError(f"point {point.name}: {e}") from e


class _Training:
    """The pool at work on a sweep's points, and what it tells of them."""

    def __init__(self, sweep: Any, workdir: pathlib.Path, values: flags.FlagValues):
        self.sweep, self.workdir, self.values = sweep, workdir, values
        self.begun: dict[str, tuple[float, int]] = {}  # time, and length of the log
        self.num_ended = self.num_jobs = 0
        self.num_steps: dict[str, int] = {}

    def run(self, pairs: Pairs) -> str:
        """Train; returns the name of the signal that stopped it, or ""."""
        from soup_jax.sweeps import pool

        jobs = [job for point, cfg in pairs if (job := self._job(point, cfg))]
        self.num_jobs = len(jobs)
        if len(pairs) > len(jobs):
            _log.info("%d of them have ended before", len(pairs) - len(jobs))
        if not jobs:
            return ""
        devices = max(cfg.mesh.num_devices for _, cfg in pairs)
        slots = pool.slots(self.values.jobs, len(jobs), devices_per_job=devices)
        _log.info("%d at a time", len(slots))
        _wait_until_free([job.log.parent for job in jobs])
        workers = pool.Pool(slots, _WORKER)
        workers.run(jobs, started=self._started, ended=self._ended)
        return workers.stopped

    def _job(self, point: Any, cfg: ConfigDict) -> Any:
        from soup_jax.sweeps import pool, table

        folder = self.workdir / point.name
        state = table.outcome(folder)["state"]
        commands = []
        if state != "done" and (state != "failed" or self.values.retry_failed):
            words = [*self.sweep.train, *point.arguments, f"--workdir={folder}"]
            commands.append(["train", *words, "--distributed=off"])
        if self.values.evaluate and (commands or state == "done"):
            if not (folder / "evaluation_tuning.json").exists():
                sets = [f"--specialists={pattern}" for pattern in cfg.evaluate.specialists]
                commands.append(["evaluate", f"--workdir={folder}", "--part=tuning", *sets])
        if not commands:
            return None
        self.num_steps[point.name] = cfg.num_steps
        return pool.Job(point.name, commands, folder / "log.txt")

    def _started(self, job: Any) -> None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        with job.log.open("a", encoding="utf-8") as log:
            for words in job.commands:
                log.write(f"+ {shlex.join(['soup-jax', *words])}\n")
            self.begun[job.name] = time.perf_counter(), log.tell()
        _log.info("%s: started", job.name)

    def _ended(self, job: Any, status: int) -> None:
        from soup_jax.sweeps import table

        start, length = self.begun[job.name]
        seconds, folder = time.perf_counter() - start, job.log.parent
        trained = (folder / "checkpoints" / str(self.num_steps[job.name])).is_dir()
        self.num_ended += 1
        where = f"{self.num_ended} of {self.num_jobs}"
        if status == 0 and not trained:
            _log.info("%s: %s, stopped by a signal in %.0f s", where, job.name, seconds)
        elif status == 0:
            table.record(folder, state="done", seconds=seconds)
            _log.info("%s: %s, done in %.0f s", where, job.name, seconds)
        else:
            error = _reason(job.log, length, status)
            table.record(folder, state="failed", seconds=seconds, error=error)
            _log.warning("%s: %s, FAILED in %.0f s: %s", where, job.name, seconds, error)


def _reason(log: pathlib.Path, start: int, status: int) -> str:
    # The last words of a job, or the signal that its worker died of.
    if status < 0:
        name = signal.Signals(-status).name
        return f"killed by {name}" + " (out of memory, perhaps)" * (name == "SIGKILL")
    with log.open("rb") as f:
        f.seek(max(start, log.stat().st_size - (1 << 16)))
        lines = [x.strip() for x in f.read().decode("utf-8", "replace").splitlines() if x.strip()]
    told = [line for line in lines if line.startswith("soup-jax: error: ")]
    return (told or lines or [f"ended with status {status}"])[-1].removeprefix("soup-jax: error: ")


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


def _tell(
    sweep: Any, workdir: pathlib.Path, metric: str, *, only: Pairs | None = None
) -> int:
    from soup_jax.sweeps import table

    rows = table.rows(sweep, workdir)
    if only is None:
        metric = table.choose_metric(rows, metric)
        names = table.columns(sweep)
        print(table.text(rows, names, metric))
        table.write_tsv(rows, names, metric, workdir / "table.tsv")
        picture = table.drawn(rows, names, metric, workdir)
        print(f"table: {workdir / 'table.tsv'}\npicture: {picture}")
        if best := table.best(rows, metric):
            print(f"best by {metric}, {best.point.name}:")
            print("  " + shlex.join(table.command(sweep, best.point, workdir)))
    else:
        mine = {point.name for point, _ in only}
        rows = [row for row in rows if row.point.name in mine]
    failed = [row for row in rows if row.state == "failed"]
    if not failed:
        return 0
    sys.stdout.flush()
    print(
        f"soup-jax: error: {len(failed)} of {len(rows)} points failed; --retry_failed trains them "
        "again:",
        file=sys.stderr,
    )
    for row in failed:
        print(f"  {row.point.name}: {row.error} ({workdir / row.point.name}/log.txt)", file=sys.stderr)
    return 1
