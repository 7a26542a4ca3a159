"""The console command: `soup-jax SUBCOMMAND ...`, also `python -m soup_jax.cli SUBCOMMAND ...`.

    soup-jax prepare     --config=FILE.py                       raw text -> prepared corpus
    soup-jax plan        --config=FILE.py --topology=v5e:4x4    memory, traffic and time of a run
    soup-jax train       --config=FILE.py --workdir=RUN         corpus -> trained soup
    soup-jax evaluate    --workdir=RUN --specialists='DIR/*'    losses of specialists and baselines
    soup-jax instantiate --run=RUN --documents=F --out=DIR      documents -> one small model
    soup-jax generate    --model=DIR --prompt=TEXT              continue a prompt with it

A config is a Python file with `get_config()`; `--config=FILE.py:ARG` passes it an argument, and
`--config.section.field=value` changes a field. `soup-jax SUBCOMMAND --help` lists the flags.
Exit status: 0 if what was asked is done; 1 if `plan` finds that the run does not fit, or training
diverged; 2 for something you can fix, said in one line.
"""

import logging
import os
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import write_json, write_text


def _config_flag(values: flags.FlagValues, argv: Sequence[str]) -> None:
    from ml_collections import config_flags

    # Checked before parsing: without the file, overrides would be reported as unknown flags.
    given = [a for a in argv if a.startswith(("--config", "-config"))]
    if given and not any(a.lstrip("-").startswith("config=") for a in given):
        raise UserError("--config=FILE.py is required")
    config_flags.DEFINE_config_file(
        "config",
        None,
        "config file, FILE.py or FILE.py:ARG; names of shipped ones work anywhere",
        lock_config=True,
        flag_values=values,
        sys_argv=list(argv),
    )


def _resolve_config(arguments: Sequence[str]) -> list[str]:
    # `--config=experiments/quickstart.py` works outside a checkout too: the shipped file is used
    # when there is none of that name here.
    from soup_jax.experiments import base

    folder = pathlib.Path(base.__file__).parent
    resolved = []
    pending = list(arguments)
    while pending:
        argument = pending.pop(0)
        if argument in ("--config", "-config") and pending:
            argument = f"{argument}={pending.pop(0)}"
        flag, _, value = argument.partition("=")
        if flag in ("--config", "-config") and value:
            path, colon, rest = value.partition(":")
            shipped = folder / path.removeprefix("experiments/")
            if not os.path.exists(path):
                if not (path.startswith("experiments/") and shipped.exists()):
                    names = sorted(f"experiments/{p.name}" for p in folder.glob("[a-z]*.py"))
                    raise UserError(f"no config file {path!r}; shipped with soup_jax: {names}")
                argument = f"{flag}={shipped}{colon}{rest}"
        resolved.append(argument)
    return resolved


def _checked_config(values: flags.FlagValues) -> Any:
    from soup_jax.config import schema as config_lib

    if values.config is None:
        raise UserError("--config=FILE.py is required")
    return config_lib.check(values.config)


def _start_jax() -> None:
    from soup_jax.hardware import host_memory

    host_memory.keep_freed()  # before the threads that importing jax starts
    from soup_jax.hardware import compile_cache

    compile_cache.enable()


def _set_up_logging() -> None:
    # Our own messages only: the libraries' running commentary stays at warnings.
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    logger = logging.getLogger("soup_jax")
    logger.handlers[:] = [handler]
    logger.propagate = False
    logger.setLevel(logging.INFO)


def _define_prepare(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _config_flag(values, argv)


def _prepare(values: flags.FlagValues) -> int:
    from soup_jax.data.prepare.stages import prepare

    prepare(_checked_config(values))
    return 0


def _define_plan(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _config_flag(values, argv)
    string = flags.DEFINE_string
    string("topology", "", "TPU slice to compile for, such as v5e:4x4", flag_values=values)
    string("chip", "", "chip to plan for, such as H200; default: what is here", flag_values=values)
    flags.DEFINE_integer(
        "num_devices", 0, "how many; default: what is here, or 1", lower_bound=0, flag_values=values
    )
    string("json", "", "a file that gets the numbers", flag_values=values)


def _plan(values: flags.FlagValues) -> int:
    cfg = _checked_config(values)
    _start_jax()
    if values.topology:
        # The slice is not this machine: no accelerator here is taken, none that fails disturbs.
        import jax

        jax.config.update("jax_platforms", "cpu")
    from soup_jax.planning import plan as plan_lib
    from soup_jax.planning.target import find_target

    target = find_target(
        cfg, topology=values.topology, chip=values.chip, num_devices=values.num_devices
    )
    plan = plan_lib.make_plan(cfg, target)
    print(plan_lib.to_text(plan))
    if values.json:
        write_json(pathlib.Path(values.json), plan_lib.to_json(plan))
    return 0 if plan.fits else 1


def _define_train(values: flags.FlagValues, argv: Sequence[str]) -> None:
    _config_flag(values, argv)
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
        "devices of this machine to use, such as 0,1; default all",
        flag_values=values,
    )


def _train(values: flags.FlagValues) -> int:
    cfg = _checked_config(values)
    if not values.workdir:
        raise UserError("--workdir=DIR is required: the folder the run is written to")
    from soup_jax.processes import place as cluster

    ids = values.local_device_ids
    given = cluster.Settings(
        values.coordinator,
        values.num_processes,
        values.process_id,
        None if ids is None else cluster.device_ids(ids),
    )
    place = cluster.find_place(values.distributed, given)
    _start_jax()
    from soup_jax.processes import start as distributed

    with distributed.processes(cfg, place) as group:
        return _train_here(
            cfg,
            pathlib.Path(values.workdir),
            accept_changes=values.accept_changes,
            show=group.process_id == 0,
        )


def _train_here(cfg: Any, workdir: pathlib.Path, *, accept_changes: bool, show: bool) -> int:
    from soup_jax.specialists import compare as report
    from soup_jax.training import loop as train

    def tell(text: str, **where: Any) -> None:
        if show:
            print(text, **where)

    try:
        train.train(cfg, workdir, accept_changes=accept_changes)
    except train.Interrupted as e:
        tell(f"soup-jax: {e}")
        return 0
    except FloatingPointError as e:
        tell(f"soup-jax: error: {e}", file=sys.stderr)
        return 1
    if show:
        tell(f"trained: {workdir} (learning curve: {report.learning_curve(workdir)})")
    return 0


def _define_evaluate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    string, multi = flags.DEFINE_string, flags.DEFINE_multi_string
    string("workdir", "", "the run to evaluate", flag_values=values)
    multi("against", [], "another run, added as a column; may be repeated", flag_values=values)
    multi("specialists", [], "file or glob of specialist documents", flag_values=values)
    string("json", "", "where the numbers go; default RUN/evaluation.json", flag_values=values)
    string("text", "", "a file that gets what is printed, too", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)
    flags.DEFINE_integer(
        "max_windows", None, "scored per set; 0: all; default: the run's config", flag_values=values
    )
    flags.DEFINE_enum(
        "part",
        "final",
        ["final", "tuning"],
        "of the specialists' documents: tuning is what training's own evaluations score",
        flag_values=values,
    )


def _evaluate(values: flags.FlagValues) -> int:
    if not values.workdir:
        raise UserError("--workdir=RUN is required: the run to evaluate")
    _start_jax()
    from soup_jax.specialists import compare as report

    table, paths = report.evaluate_runs(
        pathlib.Path(values.workdir),
        against=[pathlib.Path(p) for p in values.against],
        specialists=list(values.specialists),
        json_path=values.json,
        step=values.step,
        max_windows=values.max_windows,
        part=values.part,
    )
    text = "\n".join([table, *(f"{name}: {path}" for name, path in paths.items())])
    print(text)
    if values.text:
        write_text(values.text, text + "\n")
    return 0


def _define_instantiate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    string = flags.DEFINE_string
    string("run", "", "the run whose soup is used", flag_values=values)
    string("documents", "", "file of sample documents of the wanted specialist", flag_values=values)
    string("out", "", "folder the specialist is written to", flag_values=values)
    string("corpus", "", "the prepared corpus, if it was moved", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)


def _instantiate(values: flags.FlagValues) -> int:
    for name in ("run", "documents", "out"):
        if not values[name].value:
            raise UserError(f"--{name} is required")
    _start_jax()
    from soup_jax.specialists import instantiate as specialist_lib

    made, nearest = specialist_lib.instantiate_to(
        values.run, values.documents, values.out, step=values.step, corpus_dir=values.corpus
    )
    print(f"{made.histogram.num_documents} documents, most like these domains of the corpus:")
    for label, weight in nearest:
        print(f"  {weight:6.1%}  {label}")
    for warning in made.histogram.warnings():
        print(f"warning: {warning}")
    print(f"specialist: {values.out}")
    return 0


def _define_generate(values: flags.FlagValues, argv: Sequence[str]) -> None:
    del argv
    flags.DEFINE_string("model", "", "folder that `instantiate` wrote", flag_values=values)
    flags.DEFINE_string("prompt", "", "text to continue", flag_values=values)
    flags.DEFINE_integer("max_tokens", 100, "tokens to add", lower_bound=1, flag_values=values)
    flags.DEFINE_float(
        "temperature", 0.8, "0 takes the likeliest token", lower_bound=0.0, flag_values=values
    )
    flags.DEFINE_integer("seed", 0, "of the sampling", flag_values=values)


def _generate(values: flags.FlagValues) -> int:
    if not values.model:
        raise UserError("--model=DIR is required: a folder that `soup-jax instantiate` wrote")
    _start_jax()
    from soup_jax.specialists.generate import generate

    print(
        values.prompt
        + generate(
            values.model,
            values.prompt,
            max_tokens=values.max_tokens,
            temperature=values.temperature,
            seed=values.seed,
        )
    )
    return 0


Define = Callable[[flags.FlagValues, Sequence[str]], None]
SUBCOMMANDS: dict[str, tuple[Define, Callable[[flags.FlagValues], int]]] = {
    "prepare": (_define_prepare, _prepare),
    "plan": (_define_plan, _plan),
    "train": (_define_train, _train),
    "evaluate": (_define_evaluate, _evaluate),
    "instantiate": (_define_instantiate, _instantiate),
    "generate": (_define_generate, _generate),
}


def run(argv: Sequence[str]) -> int:
    """Run one subcommand with its arguments; returns the exit status."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(__doc__)
        return 0 if argv else 2
    name, *arguments = argv
    if name not in SUBCOMMANDS:
        print(
            f"soup-jax: error: unknown subcommand {name!r}; there are {', '.join(SUBCOMMANDS)}",
            file=sys.stderr,
        )
        return 2
    define, action = SUBCOMMANDS[name]
    values = flags.FlagValues()
    if "--help" in arguments or "-h" in arguments:
        define(values, [])
        print(f"{__doc__}\nFlags of {name}:\n{values.module_help(__name__)}")
        return 0
    _set_up_logging()
    try:
        command = [f"soup-jax {name}", *_resolve_config(arguments)]
        define(values, command)
        rest = values(command)[1:]
        if rest:
            raise UserError(f"unexpected arguments {rest}; flags are given as --name=value")
        return action(values)
    except UserError as e:
        print(f"soup-jax: error: {e}", file=sys.stderr)
    except (flags.Error, AttributeError, TypeError, ValueError, KeyError) as e:
        if not _about_flags(e):
            raise
        print(f"soup-jax: error: {_plain(e)}", file=sys.stderr)
    return 2


def _plain(error: BaseException) -> str:
    # The parser wraps what a config file raised in pages of tried paths, and a KeyError's text in
    # quotes; what the user needs is the innermost sentence.
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
    text = lines[-1] if len(lines) > 3 else " ".join(lines)
    return text.strip("\"'").replace("\\'", "'").replace("\\n", ". ")


def _about_flags(error: BaseException) -> bool:
    # ml_collections reports a mistyped field or value with plain Python errors from inside the
    # parser; the same types from anywhere else are bugs and keep their traceback.
    if isinstance(error, flags.Error):
        return True
    trace = error.__traceback__
    while trace is not None:
        if "config_flags" in trace.tb_frame.f_code.co_filename:
            return True
        trace = trace.tb_next
    return False


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
