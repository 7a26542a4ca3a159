"""Twelve points by `soup-jax sweep` against twelve `soup-jax train` one after another.

    python benchmarks/sweep.py --config=experiments/quickstart.py:fast [--steps=20] [--jobs=0 ...]
        [--config.section.field=value ...]

needs the config's corpus. Four learning rates and three seeds, `--steps` each. The separate runs,
and each sweep of `--jobs` at a time, begin with an empty cache of compiled code, and are timed
one after the other. Printed is a line of JSON: seconds of each and CPU seconds, which tell more on
a machine that has other work, their ratios to those of the separate runs, and whether all metrics
have the same bits.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import tempfile
import time

from soup_jax.training import metrics

TIMES = ("step_ms", "data_wait_ms", "tokens_per_second", "mfu")
RATES, SEEDS = (3e-3, 4e-3, 5.5e-3, 8e-3), (0, 1, 2)


def call(arguments, cache):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-m", "soup_jax.cli", *arguments],
        env={**env, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(done.stderr)


def numbers(run):
    lines = metrics.read_metrics(run / "metrics.jsonl")
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def clock():
    """(seconds, CPU seconds of all processes that have ended)."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter(), used.ru_utime + used.ru_stime


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/quickstart.py:fast")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--jobs", type=int, nargs="*", default=[1, 0])
    args, overrides = parser.parse_known_args()
    steps = {"num_steps": args.steps, "log.every_steps": max(args.steps // 4, 1)}
    steps |= {"optimizer.warmup_steps": args.steps // 4, "evaluate.every_steps": 0}
    words = [f"--config={args.config}", *(f"--config.{k}={v}" for k, v in steps.items())]
    words += overrides
    seconds, found = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        start = clock()
        for rate in RATES:
            for seed in SEEDS:
                name = f"optimizer.learning_rate={rate},seed={seed}"
                own = [f"--config.optimizer.learning_rate={rate}", f"--config.seed={seed}"]
                call(["train", *words, *own, f"--workdir={here / name}"], here / "cache")
                found[name] = numbers(here / name)
        seconds["separate"] = [b - a for a, b in zip(start, clock())]
        same = True
        for jobs in args.jobs:
            sweep, axes = here / f"sweep{jobs}", [",".join(map(str, x)) for x in (RATES, SEEDS)]
            own = [f"--sweep.optimizer.learning_rate={axes[0]}", f"--sweep.seed={axes[1]}"]
            start = clock()
            call(
                ["sweep", *words, *own, f"--workdir={sweep}", f"--jobs={jobs}"],
                here / f"cache{jobs}",
            )
            seconds[f"jobs={jobs}"] = [b - a for a, b in zip(start, clock())]
            same &= all(numbers(sweep / name) == lines for name, lines in found.items())
    result = {"same_bits": same}
    for which, unit in enumerate(("seconds", "cpu_seconds")):
        result[unit] = {name: round(x[which], 1) for name, x in seconds.items()}
        base = seconds["separate"][which]
        result[f"ratio_of_{unit}"] = {n: round(x[which] / base, 3) for n, x in seconds.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
