"""Time of one train step: soups against the dense step of the same base network, in one run.

    python benchmarks/step.py [--config=experiments/minipile.py] [--experts=8,32] [--rounds=15]

Variants are alternated round by round, so that a machine whose speed drifts slows all of them
alike; medians and ratios to the dense step are printed. Random tokens; no data is read.
"""

import argparse
import statistics
import time

import common
import jax


def build(cfg):
    """() -> seconds of one step, state kept inside; and the seconds of the first one."""
    training = common.build(cfg)

    def run():
        start = time.perf_counter()
        training.advance()
        jax.block_until_ready(training.state)
        return time.perf_counter() - start

    return run, run()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/minipile.py")
    parser.add_argument("--experts", default="8,32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    variants = {"dense": {"num_experts": 0, "num_mixtures": 1}}
    for num_experts in (int(e) for e in args.experts.split(",")):
        for bank in ("merged", "adamw"):
            fields = {"num_experts": num_experts, "optimizer.bank": bank}
            variants[f"{num_experts} experts, {bank}"] = fields
    runs = {}
    for name, fields in variants.items():
        cfg = common.read_config(args.config)
        cfg.update_from_flattened_dict(fields)
        runs[name], compile_seconds = build(cfg)
        print(f"{name}: first step {compile_seconds:.1f} s", flush=True)
    times = {name: [] for name in runs}
    for _ in range(args.rounds):
        for name, run in runs.items():
            times[name].append(run())
    dense = times["dense"]
    print(f"\n{'variant':<22}{'median ms':>10}{'/ dense':>9}")
    for name, values in times.items():
        ratio = statistics.median(v / d for v, d in zip(values, dense))
        print(f"{name:<22}{1e3 * statistics.median(values):>10.1f}{ratio:>9.2f}")


if __name__ == "__main__":
    main()
