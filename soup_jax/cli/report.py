"""`soup-jax report`: runs as one web page that needs no network.

    soup-jax report runs/soup runs/generic --out=report.html

A RUN is a run's folder, a folder above runs, such as a sweep's, or a glob. Runs that differ in the
seed alone are one line with a band.
"""

import pathlib
from collections.abc import Sequence

from absl import flags

from soup_jax.errors import UserError
from soup_jax.storage import check_file_target

POSITIONAL = "run"
SEVERAL = True  # positional arguments


def define(values: flags.FlagValues, argv: Sequence[str]) -> None:
    """Define the flags."""
    del argv
    flags.DEFINE_multi_string(
        "run", [], "a run, a folder above runs, or a glob; also without --run=", flag_values=values
    )
    flags.DEFINE_string("out", "report.html", "the page", flag_values=values)


def run(values: flags.FlagValues) -> int:
    """Write the page; returns the exit status."""
    if not values.run:
        raise UserError("give the runs: soup-jax report RUN... [--out=report.html]")
    check_file_target(values.out, "--out")
    from soup_jax.reports.write import report

    command = ["soup-jax", "report", *values.run, f"--out={values.out}"]
    found = report(values.run, out=values.out, command=command)
    num_runs, num_groups = len(found["runs"]), len(found["groups"])
    size = pathlib.Path(values.out).stat().st_size
    for row in found["runs"]:
        for problem in row["problems"]:
            print(f"{row['place']}: {problem}")
    for problem in found["unread"]:
        print(f"left out: {problem}")
    several = f" of {num_groups} configs" if num_groups > 1 else ""
    print(f"report: {values.out} ({num_runs} runs{several}, {size / 1e6:.2f} MB)")
    return 0
