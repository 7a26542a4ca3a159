"""Memory, speed and trace of real train steps on the accelerators that are here.

    python benchmarks/pod.py --config=experiments/soup_110m.py --trace=runs/trace \\
        --config.experts.dtype=bfloat16 --config.optimizer.moment_dtype=bfloat16 \\
        --config.optimizer.bank=adamw --config.optimizer.grad_accumulation=8 \\
        --config.model.remat=full    # for one GPU of 141 GB
    python benchmarks/pod.py --dry_run    # a tiny network, on any machine, in about a minute

Random tokens; no data is read. The pieces (merge, gradient of alpha, update of the bank) are timed
as programs of their own, with the shapes and layouts that they have inside the step; their share
is of the whole step's time. A trace opens in TensorBoard or Perfetto.
"""

import argparse
import contextlib
import json
import pathlib
import statistics
import time

import common
import jax
import jax.numpy as jnp

from soup_jax.optim.bank import bank_optimizer
from soup_jax.planning import abstract, roofline
from soup_jax.soup import bank as experts_lib
from soup_jax.soup import layout as sharding
from soup_jax.soup import merge
from soup_jax.training import build, metrics

TINY = {
    "num_domains": 16,
    "num_experts": 4,
    "num_mixtures": 2,
    "vocab_size": 512,
    "seq_len": 64,
    "batch_size": 16,
    "model.num_layers": 2,
    "model.dim": 64,
    "model.num_heads": 2,
    "model.num_kv_heads": 2,
    "model.hidden_dim": 128,
    "model.loss_chunk": 32,
    "domain_weights.support_size": 4,
}


def timed(function, repeats):
    """Median seconds of `function()`, which gives back what must be waited for."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def run_steps(training, num_steps, trace):
    """(seconds of the first step, median seconds of a later one, seconds a step back to back)."""
    start = time.perf_counter()
    training.advance()
    jax.block_until_ready(training.sums)
    first = time.perf_counter() - start

    def step():
        training.advance()
        return training.sums

    single = timed(step, min(num_steps, 5))
    start = time.perf_counter()
    for _ in range(num_steps):
        training.advance()
    jax.block_until_ready(training.state)
    together = (time.perf_counter() - start) / num_steps
    with jax.profiler.trace(trace) if trace else contextlib.nullcontext():
        if trace:
            for _ in range(3):
                training.advance()
            jax.block_until_ready(training.state)
    return first, single, together


def piece_seconds(training, repeats):
    """Seconds of the parts of a step of its dense experts, which are updated in place on the way;
    low-rank factors have no parts of their own."""
    cfg, mesh, params = training.cfg, training.abstract.mesh, training.state.params
    experts = params["bank"].get("dense")
    if not experts:
        return {}
    state = training.state.opt_state["bank"]["dense"]
    groups = build.num_groups(cfg)
    optimizer = bank_optimizer(build.optimizer_config(cfg))
    alpha_ME = jax.device_put(
        jax.random.normal(jax.random.key(1), (groups, cfg.num_experts)), sharding.replicated(mesh)
    )

    @jax.jit
    def merged(shared, experts, alpha_ME):
        return merge.merge_many(
            shared, {"dense": experts}, alpha_ME, dtype=cfg.model.dtype, mesh=mesh
        )

    @jax.jit
    def gradients(shared):
        def leaf(x):
            slices = sharding.to_slices(mesh, jnp.broadcast_to(x, (groups, *x.shape)))
            return slices.astype(jnp.float32)

        return jax.tree.map(leaf, shared)

    @jax.jit
    def gradient(grads, experts, alpha_ME):
        return experts_lib.gradients(grads, {"dense": experts}, alpha_ME, mesh=mesh)[0]

    def updated(experts, state, grads, alpha_ME, step):
        return optimizer.update(grads, alpha_ME, experts, state, step=step, lr=jnp.float32(1e-4))

    where = jax.tree.map(lambda x: x.sharding, (experts, state))
    update = jax.jit(updated, donate_argnums=(0, 1), out_shardings=where)
    grads = gradients(params["shared"])
    held = [experts, state]

    def run_update():
        held[:] = update(*held, grads, alpha_ME, training.state.step)
        return held

    return {
        "merge": timed(lambda: merged(params["shared"], held[0], alpha_ME), repeats),
        "gradient of alpha": timed(lambda: gradient(grads, held[0], alpha_ME), repeats),
        "update of the bank": timed(run_update, repeats),
    }


def measure(cfg, *, num_steps, trace):
    """All numbers, as a dict."""
    training = common.build(cfg)
    device = jax.devices()[0]
    first, single, together = run_steps(training, num_steps, trace)
    # Before the pieces: they hold merged gradients beside the state.
    memory = device.memory_stats() or {}
    flops = roofline.step_flops(cfg, training.abstract)["base network"]
    peak = cfg.log.peak_tflops or metrics.peak_tflops(device.device_kind)
    pieces = piece_seconds(training, repeats=min(num_steps, 10))
    loss = float(training.sums["loss"] / training.sums["steps"])
    return {
        "devices": f"{jax.device_count()} x {device.device_kind}",
        "mesh": dict(training.abstract.mesh.shape),
        "first step, s": first,
        "step, ms": 1e3 * together,
        "step with waiting, ms": 1e3 * single,
        "tokens per second": cfg.batch_size * cfg.seq_len / together,
        "MFU": flops / together / (peak * 1e12 * jax.device_count()) if peak else None,
        "state, GB per device": sum(abstract.state_bytes(training.abstract).values()) / 1e9,
        "peak memory, GB": memory["peak_bytes_in_use"] / 1e9 if memory else None,
        "memory limit, GB": memory["bytes_limit"] / 1e9 if "bytes_limit" in memory else None,
        **{f"{name}, ms": 1e3 * seconds for name, seconds in pieces.items()},
        **{f"{name}, share": seconds / together for name, seconds in pieces.items()},
        "mean loss": loss,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/soup_110m.py")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--trace", default="", help="folder for a profiler trace of three steps")
    parser.add_argument("--json", default="", help="file that gets the numbers")
    parser.add_argument("--dry_run", action="store_true", help="a tiny network, 3 steps")
    args, overrides = parser.parse_known_args()
    cfg = common.read_config(args.config, overrides)
    if args.dry_run:
        cfg.update_from_flattened_dict(TINY)
    values = measure(cfg, num_steps=3 if args.dry_run else args.steps, trace=args.trace)
    for name, value in values.items():
        shown = f"{value:.4g}" if isinstance(value, float) else value
        print(f"{name:<28}{'not known here' if value is None else shown}")
    if args.json:
        pathlib.Path(args.json).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
