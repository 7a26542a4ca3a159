"""`soup-jax evaluate`: losses of specialists and baselines.

    soup-jax evaluate --workdir=runs/quickstart/soup --specialists='text/specialists/*'

`--against=RUN` adds another run as a column.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import flags

from soup_jax import command, places
from soup_jax.errors import UserError
from soup_jax.storage import check_file_target, nulled, refuse_address, write_json, write_text


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    string, multi = flags.DEFINE_string, flags.DEFINE_multi_string
    string("workdir", "", "the run to evaluate", flag_values=values)
    multi("against", [], "another run, added as a column; may be repeated", flag_values=values)
    multi(
        "specialists",
        [],
        "file of a specialist's documents, or glob: each file is a specialist of its own; may be "
        "repeated",
        flag_values=values,
    )
    string(
        "json",
        "",
        "where the numbers go; default RUN/evaluation.json, of another --part evaluation_PART.json",
        flag_values=values,
    )
    string("text", "", "a file that gets what is printed, too", flag_values=values)
    flags.DEFINE_integer("step", None, "checkpoint; default the newest", flag_values=values)
    flags.DEFINE_integer(
        "max_windows",
        None,
        "scored per set; 0: all; default: the run's config",
        lower_bound=0,
        flag_values=values,
    )
    flags.DEFINE_enum(
        "part",
        "final",
        ["final", "tuning"],
        "of the specialists' documents: tuning is what training's own evaluations score",
        flag_values=values,
    )


def run(values: flags.FlagValues) -> int:
    """Evaluate the run and print the table; returns the exit status, 1 if a loss is not finite."""
    if not values.workdir:
        raise UserError("--workdir=RUN is required: the run to evaluate")
    refuse_address(values.workdir, "--workdir", objects=True)
    for flag in ("against", "specialists"):
        for path in values[flag].value or ():
            refuse_address(path, f"--{flag}", objects=True)
    for run in (values.workdir, *values.against):
        places.checkpoints(run)  # at s3:// there are none
    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    from soup_jax.evaluation import table
    from soup_jax.specialists.compare import evaluate_runs
    from soup_jax.training import learning_curve

    name = "evaluation" if values.part == "final" else f"evaluation_{values.part}"
    numbers = values.json or str(places.local(values.workdir) / f"{name}.json")
    check_file_target(numbers, "--json")
    if values.text:
        check_file_target(values.text, "--text")
    workdir, against = pathlib.Path(values.workdir), [pathlib.Path(p) for p in values.against]
    result = evaluate_runs(
        workdir,
        against=against,
        specialists=list(values.specialists),
        step=values.step,
        max_windows=values.max_windows,
        part=values.part,
    )
    text = f"{table.table(result)}\n{table.verdict(result)}"
    print(text)  # before anything is written: what was computed must not be lost
    write_json(numbers, nulled({**result, "command": command.words()}))
    if not values.json:
        numbers = places.given_back(pathlib.Path(numbers), workdir)
    where = f"numbers: {numbers}\nlearning curve: {learning_curve.drawn(workdir, against=against)}"
    print(where)
    if values.text:
        write_text(values.text, f"{text}\n{where}\n")
    if broken := table.not_numbers(result):
        print(
            f"soup-jax: error: the loss is not finite for {', '.join(broken[:3])} ({len(broken)} "
            f"in all, null in {numbers}): the parameters of this step probably are not either; "
            "--step=N takes another checkpoint",
            file=sys.stderr,
        )
        return 1
    return 0
