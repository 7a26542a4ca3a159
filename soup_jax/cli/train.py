"""`soup-jax train`: prepared corpus -> trained soup, in one process or many.

    soup-jax train --config=experiments/quickstart.py --workdir=runs/quickstart/soup

The same command continues a run that stopped.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import ConfigDict

from soup_jax.cli import config_flag
from soup_jax.errors import UserError
from soup_jax.remote import spelled


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    config_flag.define(values, argv)
    string, integer = flags.DEFINE_string, flags.DEFINE_integer
    string("workdir", "", "the run's folder; continued if it holds one", flag_values=values)
    flags.DEFINE_boolean(
        "accept_changes",
        False,
        "continue the run with the config's values of tunable fields, where they differ",
        flag_values=values,
    )
    flags.DEFINE_enum(
        "distributed",
        "auto",
        ["auto", "on", "off"],
        "many processes: auto, if flags, variables or a launcher (Slurm, Open MPI, GKE, Cloud TPU "
        "VM) say so; on: refuse to run as a single one",
        flag_values=values,
    )
    string("coordinator", None, "HOST:PORT of process 0, a free port there", flag_values=values)
    integer("num_processes", None, "of the run", flag_values=values)
    integer("process_id", None, "of this process, from 0", flag_values=values)
    string(
        "local_device_ids",
        None,
        "of many processes: devices of this machine that this one uses, such as 0,1; default all",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Train, or continue, a run; returns the exit status, 1 if it diverged."""
    cfg = config_flag.checked(values)
    if not values.workdir:
        raise UserError("--workdir=DIR is required: the folder the run is written to")
    from soup_jax.training import workdir as workdir_lib

    workdir_lib.check(values.workdir)
    from soup_jax.processes import place as place_lib

    ids = values.local_device_ids
    given = place_lib.Settings(
        values.coordinator,
        values.num_processes,
        values.process_id,
        None if ids is None else place_lib.device_ids(ids),
    )
    place = place_lib.find_place(values.distributed, given)
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.processes import start as processes

    workdir = pathlib.Path(values.workdir)
    with processes.processes(cfg, place, workdir=workdir) as group:
        return _train_here(
            cfg,
            workdir,
            accept_changes=values.accept_changes,
            show=group.process_id == 0,
        )


def _train_here(cfg: ConfigDict, workdir: pathlib.Path, *, accept_changes: bool, show: bool) -> int:
    from soup_jax.training import learning_curve, loop

    def tell(text: str, **where: Any) -> None:
        if show:
            print(text, **where)

    try:
        loop.train(cfg, workdir, accept_changes=accept_changes)
    except loop.Interrupted as e:
        tell(f"soup-jax: {e}")
        return 0
    except FloatingPointError as e:
        tell(f"soup-jax: error: {e}", file=sys.stderr)
        return 1
    if show:
        tell(f"trained: {spelled(workdir)} (learning curve: {learning_curve.drawn(workdir)})")
    return 0
