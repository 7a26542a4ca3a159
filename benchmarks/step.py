"""Time of one train step: what the experts add to the dense step, against its floor.

    python benchmarks/step.py [--experts=32] [--mixtures=1] [--config=FILE] ...

For every number of experts: the dense step of the same base network; a straightforward soup
(`jax.grad` through the merge, `optax.adamw` on everything, jitted, state donated); and the real
step with each bank optimizer. Variants are alternated round by round, so that a machine whose speed
drifts slows all of them alike. Random tokens; no data is read.

Printed per variant: median seconds of a step; its overhead, the median of the differences to the
dense step of the same round; the floor and overhead / floor; how many times the straightforward
soup's overhead is larger; bytes of temporaries of the compiled step, by the compiler's account.

The floor counts passes over the bank, reading or writing it once: 7 for AdamW (merge; weights and
two moments read and written), 3 for `merged`. A pass takes bytes / w; w is the bandwidth of
copying, bytes read and written, in the same run (numpy arrays copied by one thread a core, no
memory newly allocated).
"""

import argparse
import concurrent.futures
import functools
import os
import statistics
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax

from soup_jax import soup, tree
from soup_jax.optim.config import schedule
from soup_jax.training import build

SIZES = {  # about 4M parameters
    "vocab_size": 4096,
    "seq_len": 256,
    "batch_size": 8,
    "model.num_layers": 4,
    "model.dim": 256,
    "model.hidden_dim": 704,
    "model.num_heads": 4,
    "model.num_kv_heads": 4,
}


def copy_bandwidth(num_bytes=1 << 28, rounds=7):
    """Bytes per second, read and written, of a copy between two existing arrays by all cores."""
    threads = len(os.sched_getaffinity(0))
    parts = [np.ones(num_bytes // threads // 4, np.float32) for _ in range(2 * threads)]
    pairs = list(zip(parts[:threads], parts[threads:]))
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:

        def run():
            start = time.perf_counter()
            list(pool.map(lambda pair: np.copyto(*pair), pairs))
            return time.perf_counter() - start

        seconds = statistics.median([run() for _ in range(rounds + 1)][1:])
    return 2 * num_bytes / seconds


def naive_step(training):
    """The step as one would write it first: gradients of the bank's size, plain optax."""
    cfg, model = training.cfg, training.abstract.model
    config = build.soup_config(cfg)
    o = cfg.optimizer
    plain = optax.chain(
        optax.clip_by_global_norm(o.clip_norm),
        optax.adamw(
            schedule(build.optimizer_config(cfg)),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=o.weight_decay,
            mask=lambda p: tree.map_named(lambda path, x: tree.is_matrix(path, x.ndim - 1), p),
        ),
    )

    def loss(params, batch):
        alpha_ME = soup.coefficients(params, batch.h_MK, config)
        bank = tree.flatten(params["bank"]["dense"])

        def leaf(path, shared):
            return shared + jnp.einsum("ME,E...->M...", alpha_ME, bank[path])

        theta_M = tree.map_named(leaf, params["shared"])
        rows = {name: x.reshape(len(alpha_ME), -1, *x.shape[1:]) for name, x in batch.rows.items()}
        losses, weights = jax.vmap(model.example_losses)(theta_M, rows)
        return (losses * weights).sum() / weights.sum()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, state = plain.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    params = training.state.params
    state = jax.jit(plain.init)(params)
    compiled = step.lower(params, state, training.batch).compile()
    now = [params, state]

    def run():
        now[0], now[1], _ = compiled(now[0], now[1], training.batch)
        return now

    training.state = None
    return run, compiled


def real_step(training):
    """The project's step."""
    arguments = training.state, training.sums, training.batch
    function = training.abstract.function
    compiled = function.lower(*arguments).compile()
    step = function.bind(compiled)

    def run():
        training.state, training.sums = step(training.state, training.sums, training.batch)
        return training.state

    return run, compiled


def timed(run):
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def variants(num_experts, *, naive):
    """(name, fields, passes of the floor); the dense step first."""
    yield "dense", {"num_experts": 0, "num_mixtures": 1}, 0.0
    if naive:
        yield "naive adamw", {"num_experts": num_experts, "optimizer.bank": "adamw"}, 7.0
    yield "adamw", {"num_experts": num_experts, "optimizer.bank": "adamw"}, 7.0
    yield "merged", {"num_experts": num_experts, "optimizer.bank": "merged"}, 3.0


def measure(cfg, num_experts, *, rounds, naive):
    """Print one table."""
    runs, temporaries, floors, bank_bytes = {}, {}, {}, 0
    for name, fields, passes in variants(num_experts, naive=naive):
        one = cfg.copy_and_resolve_references()
        one.update_from_flattened_dict(fields)
        training = common.build(one)
        bank_bytes = sum(x.nbytes for x in jax.tree.leaves(training.state.params["bank"]))
        runs[name], compiled = (naive_step if name.startswith("naive") else real_step)(training)
        temporaries[name] = compiled.memory_analysis().temp_size_in_bytes
        floors[name] = passes * bank_bytes
        timed(runs[name])
    bandwidth = copy_bandwidth()
    times = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(timed(run))
    bandwidth = statistics.median([bandwidth, copy_bandwidth()])
    over = {
        name: statistics.median(t - d for t, d in zip(values, times["dense"]))
        for name, values in times.items()
    }
    print(
        f"\n{num_experts} experts, {cfg.num_mixtures} mixtures, bank {bank_bytes / 1e9:.3f} GB, "
        f"copying {bandwidth / 1e9:.1f} GB/s: a pass takes {1e3 * bank_bytes / bandwidth:.1f} ms"
    )
    heads = ("step ms", "overhead", "floor", "over/floor", "naive/this", "temp MB")
    print(f"{'variant':<16}" + "".join(f"{h:>11}" for h in heads))
    for name, values in times.items():
        cells = [f"{1e3 * statistics.median(values):.1f}"]
        if name == "dense":
            cells += [""] * 4
        else:
            floor = floors[name] / bandwidth
            cells += [f"{1e3 * over[name]:.1f}", f"{1e3 * floor:.1f}", f"{over[name] / floor:.2f}"]
            cells += [f"{over['naive adamw'] / over[name]:.2f}" if naive else ""]
        cells += [f"{temporaries[name] / 1e6:.1f}"]
        print(f"{name:<16}" + "".join(f"{c:>11}" for c in cells), flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="a config file; default: SIZES")
    parser.add_argument("--experts", default="32", help="numbers of experts, comma-separated")
    parser.add_argument("--mixtures", default="1", help="numbers of mixtures, comma-separated")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True)
    args, overrides = parser.parse_known_args()
    for num_experts in (int(e) for e in args.experts.split(",")):
        for num_mixtures in (int(m) for m in args.mixtures.split(",")):
            cfg = common.read_config(args.config or "experiments/base.py")
            if not args.config:
                cfg.update_from_flattened_dict(SIZES)
            cfg.num_mixtures = num_mixtures
            common.override(cfg, overrides)
            measure(cfg, num_experts, rounds=args.rounds, naive=args.naive)


if __name__ == "__main__":
    main()
