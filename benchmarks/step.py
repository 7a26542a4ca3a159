"""Time of one train step: soups against the dense step of the same base network, in one run.

    python benchmarks/step.py [--config=experiments/minipile.py] [--experts=8,32] [--rounds=15]

Variants are alternated round by round, so that a machine whose speed drifts slows all of them
alike; medians and ratios to the dense step are printed. Random tokens; no data is read.
"""

import argparse
import runpy
import statistics
import time

import jax
import numpy as np

from soup_jax import config as config_lib
from soup_jax import loader, mesh, model, sharding, train_state, train_step


def build(cfg):
    """() -> seconds of one step, state kept inside."""
    config_lib.check(cfg)
    base_model, m = model.from_config(cfg), mesh.make_mesh(cfg)
    frequencies = np.full(cfg.num_domains, 1 / cfg.num_domains)
    init = train_state.make_init(cfg, base_model, frequencies_K=frequencies)
    shardings = train_state.state_shardings(m, jax.eval_shape(init))
    state = jax.jit(init, out_shardings=shardings)()
    sums = jax.device_put(train_step.zero_metrics(cfg.num_domains), sharding.replicated(m))
    step = train_step.compile_step(cfg, base_model, m, shardings)
    rng = np.random.default_rng(0)
    shape = (cfg.batch_size, cfg.seq_len + 1)
    batch = {
        "tokens": rng.integers(0, cfg.vocab_size, shape).astype(np.int32),
        "num_targets": np.full(cfg.batch_size, cfg.seq_len, np.int32),
        "domain": rng.integers(0, cfg.num_domains, cfg.batch_size).astype(np.int32),
        "h": rng.dirichlet(np.ones(cfg.num_domains), cfg.num_mixtures).astype(np.float32),
    }
    batch = loader.to_device(batch, m)

    def run():
        nonlocal state, sums
        start = time.perf_counter()
        state, sums = step(state, sums, batch)
        jax.block_until_ready(state)
        return time.perf_counter() - start

    start = time.perf_counter()
    run()
    return run, time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/minipile.py")
    parser.add_argument("--experts", default="8,32")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    get_config = runpy.run_path(args.config)["get_config"]
    variants = {"dense": {"num_experts": 0, "num_mixtures": 1}}
    for num_experts in (int(e) for e in args.experts.split(",")):
        for bank in ("merged", "adamw"):
            fields = {"num_experts": num_experts, "optimizer.bank": bank}
            variants[f"{num_experts} experts, {bank}"] = fields
    runs = {}
    for name, fields in variants.items():
        cfg = get_config()
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
