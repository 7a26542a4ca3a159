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
import sys
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


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags, --sweep.FIELD for the fields that argv names among them."""
    config_flag.define(values, argv)
    string, boolean = flags.DEFINE_string, flags.DEFINE_bool
    string("workdir", "", "the sweep's folder, continued if it holds one", flag_values=values)
    flags.DEFINE_integer(
        "jobs",
        0,
        "runs at a time, each on cores or GPUs of its own; 0: as many as there are cores, "
        "with 2 GiB of free memory each, or GPUs",
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
    """Train, and print the table; returns the exit status, 1 if a point failed."""
    from soup_jax.sweeps import points, table, work

    if not values.workdir:
        raise UserError("--workdir=DIR is required: the folder of the sweep")
    workdir = pathlib.Path(os.path.normpath(values.workdir))
    files.check_folder_target(values.workdir, "--workdir")
    if values.table:
        sweep = points.load(workdir)
        return _tell(sweep, workdir, values.metric or "", table.rows(sweep, workdir))
    cfg = config_flag.given(values)  # a point may set what it lacks
    shard = _shard(values.shard)
    overrides = points.product(_listed(values), _axes(values))
    for name in _common(values):
        if any(name in each for each in overrides):
            raise UserError(f"{name} is swept, and set by --config.{name}: leave one of them out")
    pairs = points.check(cfg, overrides)
    common = [points.argument(n, v) for n, v in _common(values).items()]
    train = [f"--config={_file(values)}", *common]
    work.check_evaluations(pairs, evaluate=values.evaluate, metric=values.metric or "")
    work.check_runs(pairs, workdir)
    print(f"{len(pairs)} points")
    if values.dry_run:
        for point, _ in pairs:
            words = ["soup-jax", "train", *train, *point.arguments]
            print(shlex.join([*words, f"--workdir={workdir / point.name}"]))
        return 0
    told = ["workdir", "jobs", "shard", "evaluate", "metric", *_axis_flags(values)]
    given = [f"--{name}={values[name].value}" for name in told if values[name].present]
    names = [point.name for point, _ in pairs]
    before = points.load(workdir) if (workdir / "sweep.json").exists() else None
    known = [*before.earlier, *(p.name for p in before.points)] if before else []
    earlier = [name for name in dict.fromkeys(known) if name not in names]
    if earlier:
        _log.info("no longer in the sweep, and left alone: %s", "; ".join(earlier))
    command = ["soup-jax", "sweep", *train, *given]
    scoring = {point.name: work.scoring(own) for point, own in pairs}
    sweep = points.Sweep(command, train, [point for point, _ in pairs], earlier, scoring)
    workdir.mkdir(parents=True, exist_ok=True)
    refusal = f"another `soup-jax sweep` is at work in {workdir}"
    with files.locked(workdir, refusal, shared=shard is not None):
        points.save(sweep, workdir)
        mine = pairs[shard[0] :: shard[1]] if shard else pairs
        training = work.Work(
            sweep,
            workdir,
            worker=_WORKER,
            evaluate=values.evaluate,
            retry_failed=values.retry_failed,
        )
        stopped = training.run(mine, jobs=values.jobs)
        if stopped:
            print(f"soup-jax: {stopped}: saved; the same command continues")
            return 0
        rows = table.rows(sweep, workdir, training.errors)
        return _tell(sweep, workdir, values.metric or "", rows, only=mine if shard else None)


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
        axes[name] = points.axis(name, values[flag].value or "")
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


def _tell(
    sweep: Any,
    workdir: pathlib.Path,
    metric: str,
    rows: Sequence[Any],
    *,
    only: Sequence[Any] | None = None,
) -> int:
    from soup_jax.sweeps import table

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
    unscored = [row for row in rows if row.state == "done" and row.error]
    sys.stdout.flush()
    for some, what in (
        (failed, "failed; --retry_failed trains them again"),
        (unscored, "are trained and not scored; the same command tries that again"),
    ):
        if some:
            told = f"soup-jax: error: {len(some)} of {len(rows)} points {what}:"
            logs = [f"{r.point.name}: {r.error} ({workdir / r.point.name}/log.txt)" for r in some]
            print(*[told, *logs], sep="\n  ", file=sys.stderr)
    return 1 if failed or unscored else 0
