"""First step of a first start against that of a second one, which finds the step on disk.

    python benchmarks/start.py [--config=experiments/minipile.py] [--rounds=3]
        [--config.section.field=value ...]

Each round has an empty cache of its own, switched on as the commands do it, and two processes, one
after the other. Medians of seconds: importing, initialising the state, the first step (tracing,
compiling or reading, running once), a later step. Says whether both starts end with the same bits
and what the second one wrote to stderr. Random tokens; no data is read.
"""

import argparse
import hashlib
import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

STEPS = 4


def start(config, overrides):
    """Run in a process of its own: seconds of each part, and a hash of the state at the end."""
    begin = time.perf_counter()
    import common
    import jax
    import numpy as np

    from soup_jax.hardware import compile_cache

    compile_cache.enable()
    jax.devices()
    marks = [begin, time.perf_counter()]
    training = common.build(common.read_config(config, overrides))
    jax.block_until_ready((training.state, training.sums, training.batch))
    marks.append(time.perf_counter())
    for _ in range(STEPS):
        training.advance()
        jax.block_until_ready(training.state)
        marks.append(time.perf_counter())
    seconds = [b - a for a, b in itertools.pairwise(marks)]
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(training.state):
        digest.update(np.asarray(leaf).tobytes())
    times = dict(zip(("imports", "init", "first step"), seconds))
    times["later step"] = statistics.median(seconds[3:])
    print(json.dumps({"times": times, "hash": digest.hexdigest()}))


def child(arguments, cache):
    env = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    env["XDG_CACHE_HOME"] = cache
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1]) | {"stderr": done.stderr}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/minipile.py")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args, overrides = parser.parse_known_args()
    if args.child:
        start(args.config, overrides)
        return
    rounds = []
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as cache:
            pair = [child([f"--config={args.config}", *overrides], cache) for _ in range(2)]
            entries = list(pathlib.Path(cache).rglob("*-cache"))
            size = sum(entry.stat().st_size for entry in entries)
        rounds.append(pair)
    print(f"{args.config} {' '.join(overrides)}: {len(entries)} entries, {size / 1e6:.1f} MB")
    print(f"{'seconds':<12}{'first start':>12}{'second':>9}{'ratio':>7}")
    for name in rounds[0][0]["times"]:
        first, second = ([p[i]["times"][name] for p in rounds] for i in (0, 1))
        ratio = statistics.median(b / a for a, b in zip(first, second))
        medians = statistics.median(first), statistics.median(second)
        print(f"{name:<12}{medians[0]:>12.2f}{medians[1]:>9.2f}{ratio:>7.2f}")
    same = all(len({p["hash"] for p in pair}) == 1 for pair in rounds)
    print(f"state after {STEPS} steps: {'bit-identical' if same else 'DIFFERS'}")
    print(f"the second start wrote to stderr: {rounds[-1][1]['stderr'].strip() or 'nothing'}")


if __name__ == "__main__":
    main()
