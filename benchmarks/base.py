"""The base network, forward and backward, against what its matrix products need alone.

    python benchmarks/base.py [--sizes=small,medium] [--mixtures=1,16] [--rounds=9]
        [VARIANT ...]

A VARIANT is fields of the model section, such as `loss_chunk=64,remat=dots`; `loop` in it runs the
mixtures one after the other instead of side by side. The products alone have the shapes of the
step: forward, and both of the backward pass; the peak is that of one large float32 product. All are
alternated round by round. Medians of milliseconds on the wall and of CPU time (user and system, all
threads: other work on the machine disturbs it less), GFLOP/s by `llama_flops`, which counts causal
attention as half of its square, and `/ needed`, ratios to the products alone. Random tokens, random
parameters. Run it with and without the MALLOC_ variables of launch/local.sh to see what they bring.
"""

import argparse
import ast
import dataclasses
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.models.llama import LlamaConfig, base_model

PEAK_SIDE = 2048
SIZES = {  # fields of the decoder, tokens per window, windows
    "small": ((2048, 2, 64, 2, 2, 192), 256, 16),
    "medium": ((2048, 4, 256, 4, 4, 704), 256, 16),
    "35m": ((4096, 6, 384, 6, 6, 1024), 256, 4),
}


def normal(*shape):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)


def network(config, length, rows, mixtures, loop):
    """(function of no arguments, FLOPs, bytes of temporary arrays, seconds to compile)."""
    base = base_model(config, seq_len=length)
    theta_M = jax.jit(jax.vmap(base.init))(jax.random.split(jax.random.key(0), mixtures))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (rows, length + 1))
    batch = {
        "tokens": jnp.asarray(tokens, jnp.int32).reshape(mixtures, -1, length + 1),
        "num_targets": jnp.full((mixtures, rows // mixtures), length),
    }

    def loss(theta, batch):
        losses, weights = base.example_losses(theta, batch)
        return (losses * weights).sum()

    gradient = jax.value_and_grad(loss)
    if mixtures == 1:
        step = lambda t, b: gradient(*jax.tree.map(lambda x: x[0], (t, b)))  # noqa: E731
    elif loop:
        step = lambda t, b: jax.lax.map(lambda tb: gradient(*tb), (t, b))  # noqa: E731
    else:
        step = jax.vmap(gradient)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(theta_M, batch).compile()
    seconds = time.perf_counter() - start
    temporary = compiled.memory_analysis().temp_size_in_bytes
    return lambda: compiled(theta_M, batch), base.flops_per_row * rows, temporary, seconds


def products(config, length, rows, mixtures):
    """(all products of one layer, those of the head) as functions of no arguments."""
    c, count = config, rows // mixtures
    kv = c.num_kv_heads * c.head_dim

    def weight(x, w, dy):
        return x @ w, dy @ w.T, (x.T @ dy if len(w) <= w.shape[1] else dy.T @ x)

    def attention(x, p):
        # What the scores, values, p, q, k and v are computed by. Pairs have the same shapes, but
        # other numbers: XLA would compute one of two that are the same.
        y = 2 * x
        return x @ x.mT, p @ x, y @ x.mT, p @ y, x.mT @ p, y.mT @ p

    def weights(shapes):
        n = count * length
        return [
            (normal(mixtures, n, d), normal(mixtures, d, f), normal(mixtures, n, f))
            for d, f in shapes
        ]

    d, f = c.dim, c.hidden_dim
    layer = weights([(d, d), (d, kv), (d, kv), (d, d), (d, f), (d, f), (f, d)])
    heads = normal(rows * c.num_heads, length, c.head_dim)
    scores = normal(rows * c.num_heads, length, length)

    def each(arguments):
        one = lambda arguments: [weight(*a) for a in arguments]  # noqa: E731
        if mixtures == 1:
            return one(jax.tree.map(lambda x: x[0], arguments))
        return jax.vmap(one)(arguments)

    in_layer = jax.jit(lambda a, x, p: (each(a), attention(x, p)))
    in_head, head = jax.jit(each), weights([(d, c.vocab_size)])
    return lambda: in_layer(layer, heads, scores), lambda: in_head(head)


def measure(functions, rounds):
    """Name -> (wall, CPU) milliseconds of each round."""
    times = {name: [] for name in functions}
    for turn in range(rounds + 1):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            jax.block_until_ready(function())
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if turn:  # the first one compiles and warms up
                times[name].append((1e3 * wall, 1e3 * cpu))
    return times


def variant(config, text):
    """(config, loop) of a VARIANT."""
    words = [w for w in text.split(",") if w]
    fields = dict(w.split("=") for w in words if w != "loop")
    for name, value in fields.items():
        if not isinstance(getattr(config, name), str):
            fields[name] = ast.literal_eval(value)
    return dataclasses.replace(config, **fields), "loop" in words


def table(size, mixtures, variants, rounds):
    fields, length, rows = SIZES[size]
    config = LlamaConfig(*fields)
    nets = {v: network(*_shape(config, v, length, rows, mixtures)) for v in variants}
    layer, head = products(config, length, rows, mixtures)
    square = normal(PEAK_SIDE, PEAK_SIDE)
    peak = jax.jit(jnp.dot)
    functions = {"peak": lambda: peak(square, square), "layer": layer, "head": head}
    functions |= {v: net[0] for v, net in nets.items()}
    times = measure(functions, rounds)
    need = [
        tuple(config.num_layers * a + b for a, b in zip(*pair))
        for pair in zip(times["layer"], times["head"])
    ]
    flops = next(iter(nets.values()))[1]

    def line(name, values, flops, net=None):
        wall, cpu = (statistics.median(v[i] for v in values) for i in (0, 1))
        ratios = [statistics.median(v[i] / n[i] for v, n in zip(values, need)) for i in (0, 1)]
        text = f"{name:<26}{wall:>9.1f}{cpu:>9.1f}{flops / wall / 1e6:>9.0f}"
        if values is not times["peak"]:
            text += f"{ratios[0]:>8.2f}{ratios[1]:>7.2f}"
        if net:
            text += f"{net[2] / 1e6:>9.0f}{net[3]:>9.1f}"
        print(text, flush=True)

    print(f"\n{size}: {rows} x {length} tokens, {mixtures} mixtures, {flops / 1e9:.1f} GFLOP")
    head_line = f"{'':<26}{'wall ms':>9}{'CPU ms':>9}{'GFLOP/s':>9}{'/ needed':>8}{'CPU':>7}"
    print(f"{head_line}{'temp MB':>9}{'compile':>9}")
    line(f"product of {PEAK_SIDE}", times["peak"], 2 * PEAK_SIDE**3)
    line("products alone", need, flops)
    for name, net in nets.items():
        line(name or "network", times[name], flops, net)


def _shape(config, text, length, rows, mixtures):
    config, loop = variant(config, text)
    return config, length, rows, mixtures, loop


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("variants", nargs="*", default=[""])
    parser.add_argument("--sizes", default="small,medium")
    parser.add_argument("--mixtures", default="1,16")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    for size in args.sizes.split(","):
        for mixtures in args.mixtures.split(","):
            table(size, int(mixtures), args.variants, args.rounds)


if __name__ == "__main__":
    main()
