"""What a step with experts consists of, each part beside the matrix products that it needs.

    python benchmarks/parts.py [--mixtures=1,4,8] [--rounds=7] [--config=FILE]
        [--config.FIELD=VALUE ...]

Parts, each a program of its own with the shapes of the step: the base network forward and backward
for M models, the merge, the gradient of the coefficients, and the update of the experts. Beside
each the same products with nothing around them: of the base network as `base.py` has them, of the
bank as three products of matrices, [M, E] with [E, P] (merge), [E, P] with [P, M] (coefficients)
and [E, M] with [M, P] (update, which also reads and writes the bank: its floor is copying in place,
if that takes longer). `step` is the real step; `rest` is what it takes beyond its four parts:
the update of shared parameters and router, clipping, metrics. `one read` is the first two products
of the bank in one loop over blocks of its columns: what a step could save by computing the gradient
of the last step's coefficients while it merges. All take turns, round by round; medians of
milliseconds on the wall. Random tokens, random parameters.
"""

import argparse
import functools
import statistics

import base
import common
import jax
import jax.numpy as jnp
import step as step_benchmark

from soup_jax.models.llama import llama_config
from soup_jax.optim.bank import bank_optimizer
from soup_jax.soup import bank as experts
from soup_jax.soup import merge
from soup_jax.training import build

READ_COLUMNS = 1 << 16


def parts(training):
    """{part: function of no arguments} of the bank."""
    cfg = training.cfg
    params = jax.tree.map(jnp.copy, training.state.params)  # a step donates its own
    bank, shared = params["bank"], params["shared"]
    if set(bank) != {"dense"}:
        raise SystemExit("parts.py is about dense experts")
    alpha_ME = jax.random.normal(jax.random.key(0), (cfg.num_mixtures, cfg.num_experts))
    optimizer = bank_optimizer(build.optimizer_config(cfg))
    merged = jax.jit(merge.merge_many)(shared, bank, alpha_ME)
    coefficients = jax.jit(lambda g, bank, alpha_ME: experts.gradients(g, bank, alpha_ME)[0])
    count, rate = jnp.zeros((), jnp.int32), jnp.float32(1e-9)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def update(bank, state, merged):
        return optimizer.update(merged, alpha_ME, bank, state, step=count, lr=rate)

    merge_many = jax.jit(merge.merge_many)
    own = [jax.tree.map(jnp.copy, bank["dense"]), jax.jit(optimizer.init)(bank["dense"])]

    def run_update():
        own[:] = update(*own, merged)
        return own

    return {
        "merge": lambda: merge_many(shared, bank, alpha_ME),
        "coefficients": lambda: coefficients(merged, bank, alpha_ME),
        "update": run_update,
    }


def products(training):
    """{part: function of no arguments}: its products alone; and a pass that rewrites the bank."""
    cfg = training.cfg
    bank_EP = jnp.concatenate(
        [x.reshape(cfg.num_experts, -1) for x in jax.tree.leaves(training.state.params["bank"])], 1
    )
    keys = jax.random.split(jax.random.key(1), 2)
    alpha_ME = jax.random.normal(keys[0], (cfg.num_mixtures, cfg.num_experts))
    merged_MP = jax.random.normal(keys[1], (cfg.num_mixtures, bank_EP.shape[1]))
    dot = functools.partial(jnp.dot, precision="highest")
    forward, backward = jax.jit(dot), jax.jit(lambda e, g: dot(e, g.T))
    outer = jax.jit(lambda a, g: dot(a.T, g))
    scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)
    held = [jnp.copy(bank_EP)]
    num_blocks = bank_EP.shape[1] // READ_COLUMNS

    @jax.jit
    def one_read(alpha_ME, bank_EP, merged_MP):
        def block(first, sums, size=READ_COLUMNS):
            cut = functools.partial(
                jax.lax.dynamic_slice_in_dim, start_index=first, slice_size=size, axis=1
            )
            experts = cut(bank_EP)
            theta = jax.lax.dynamic_update_slice_in_dim(sums[0], dot(alpha_ME, experts), first, 1)
            return theta, sums[1] + dot(experts, cut(merged_MP).T)

        sums = jnp.zeros_like(merged_MP), jnp.zeros_like(alpha_ME.T)
        sums = jax.lax.fori_loop(0, num_blocks, lambda i, s: block(i * READ_COLUMNS, s), sums)
        rest = bank_EP.shape[1] % READ_COLUMNS
        return block(num_blocks * READ_COLUMNS, sums, rest) if rest else sums

    def rewrite():
        held[0] = scale(held[0])
        return held[0]

    return {
        "merge": lambda: forward(alpha_ME, bank_EP),
        "coefficients": lambda: backward(bank_EP, merged_MP),
        "update": lambda: outer(alpha_ME, merged_MP),
        "rewrite": rewrite,
        "one read": lambda: one_read(alpha_ME, bank_EP, merged_MP),
    }


def measure(cfg, rounds):
    """Print one table."""
    training = common.build(cfg)
    config = llama_config(build.model_settings(cfg))
    length, rows, mixtures = cfg.seq_len, cfg.batch_size, cfg.num_mixtures
    layer, head = base.products(config, length, rows, mixtures)

    def run_step():
        training.advance()
        return training.state

    functions = {"step": run_step, "layer": layer, "head": head}
    functions["network"] = base.network(config, length, rows, mixtures, False)[0]
    functions |= parts(training)
    functions |= {f"products of {name}": f for name, f in products(training).items()}
    median = {
        name: statistics.median(wall for wall, _ in values)
        for name, values in base.measure(functions, rounds).items()
    }
    need = {"network": config.num_layers * median["layer"] + median["head"]}
    need |= {name: median[f"products of {name}"] for name in ("merge", "coefficients")}
    need["update"] = max(median["products of update"], median["products of rewrite"])
    total, needed = (sum(x[name] for name in need) for x in (median, need))
    rest = median["step"] - total
    print(f"\n{cfg.num_experts} experts, {mixtures} mixtures, {cfg.optimizer.bank}")
    print(f"{'':<14}{'ms':>9}{'products':>10}{'ratio':>8}")
    for name, value in need.items():
        print(f"{name:<14}{median[name]:>9.1f}{value:>10.1f}{median[name] / value:>8.2f}")
    print(f"{'rest':<14}{rest:>9.1f}")
    step, one_read = median["step"], median["products of one read"]
    print(f"{'one read':<14}{'':>9}{one_read:>10.1f}")
    print(f"{'step':<14}{step:>9.1f}{needed:>10.1f}{step / needed:>8.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="", help="a config file; default: as of step.py")
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--mixtures", default="1,4,8", help="numbers of them, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    args, overrides = parser.parse_known_args()
    for mixtures in (int(m) for m in args.mixtures.split(",")):
        cfg = common.read_config(args.config or "experiments/base.py")
        if not args.config:
            cfg.update_from_flattened_dict(step_benchmark.SIZES)
        cfg.num_experts, cfg.num_mixtures = args.experts, mixtures
        common.override(cfg, overrides)
        measure(cfg, args.rounds)


if __name__ == "__main__":
    main()
