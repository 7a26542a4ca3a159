"""Time of the merge against the least that its bytes take, and against what one writes at first.

    python benchmarks/merge.py [--experts=8,32,128] [--mixtures=1,4,8] [--dtypes=float32,bfloat16]

The floor: bytes that must move (bank and shared parameters read, merged models written) over the
bandwidth of a scaling in place in the same run, its bytes counted as read and written. Variants
take turns, so that a machine whose speed drifts slows all of them alike. Beside `merge_many` (and
`merge`, one specialist):

    tensordot   tree.map of S + tensordot(alpha, E)
    loop        one mixture: theta = theta + alpha[e] * E[e] for every e, one program
    blocks      a loop over blocks of 8 experts, each added to M sums in one fused pass

Random numbers; the leaves are those of `--dim` and `--layers`, 4M parameters by default.
"""

import argparse
import functools
import statistics
import time

import jax
import jax.numpy as jnp

from soup_jax.experiments import base
from soup_jax.soup import merge
from soup_jax.training import build


def copy_seconds(num_bytes):
    """() -> bytes per second of one scaling in place of that many bytes."""
    held = [jnp.ones(num_bytes // 4)]
    scale = jax.jit(lambda x: x * 1.0001, donate_argnums=0)

    def run():
        start = time.perf_counter()
        held[0] = jax.block_until_ready(scale(held[0]))
        return 2 * held[0].nbytes / (time.perf_counter() - start)

    run()
    return run


def tensordot(shared, bank, alpha_ME):
    def leaf(s, e):
        return s + jnp.tensordot(alpha_ME, e.astype(jnp.float32), axes=1)

    return jax.tree.map(leaf, shared, bank)


def loop(shared, bank, alpha_ME):
    theta = shared
    for e in range(alpha_ME.shape[1]):
        add = functools.partial(lambda e, t, x: t + alpha_ME[0, e] * x[e], e)
        theta = jax.tree.map(add, theta, bank)
    return theta


def blocks(shared, bank, alpha_ME):
    def leaf(s, stack):
        def add(block, sums):
            for e in range(8):
                expert = stack[8 * block + e].astype(jnp.float32)
                sums = [t + alpha_ME[m, 8 * block + e] * expert for m, t in enumerate(sums)]
            return sums

        sums = [s] * alpha_ME.shape[0]
        return jnp.stack(jax.lax.fori_loop(0, alpha_ME.shape[1] // 8, add, sums))

    return jax.tree.map(leaf, shared, bank)


def variants(shared, bank, alpha_ME):
    """{name: () -> seconds}, each compiled, and checked against the first."""
    functions = {
        "merge_many": lambda s, b, a: merge.merge_many(s, {"dense": b}, a),
        "tensordot": tensordot,
    }
    if alpha_ME.shape[1] % 8 == 0:
        functions["blocks"] = blocks
    if len(alpha_ME) == 1:
        functions["merge"] = lambda s, b, a: merge.merge(s, {"dense": b}, a[0])
        functions["loop"] = loop
    runs, wanted = {}, None
    for name, function in functions.items():
        jitted = jax.jit(function)

        def run(jitted=jitted):
            start = time.perf_counter()
            jax.block_until_ready(jitted(shared, bank, alpha_ME))
            return time.perf_counter() - start

        total = sum(jnp.abs(x).sum() for x in jax.tree.leaves(jitted(shared, bank, alpha_ME)))
        wanted = total if wanted is None else wanted
        if abs(total - wanted) > 1e-3 * wanted:
            raise SystemExit(f"{name} gives something else than merge_many")
        runs[name] = run
    return runs


def measure(shared, bank, alpha_ME, *, copy, rounds):
    """({name: median seconds}, {name: median of time / floor})."""
    runs = variants(shared, bank, alpha_ME)
    merged_bytes = len(alpha_ME) * sum(x.nbytes for x in jax.tree.leaves(shared))
    moved = sum(x.nbytes for x in jax.tree.leaves((shared, bank))) + merged_bytes
    seconds, ratios = ({name: [] for name in runs} for _ in range(2))
    for _ in range(rounds):
        floor = moved / copy()
        for name, run in runs.items():
            seconds[name].append(run())
            ratios[name].append(seconds[name][-1] / floor)
    return tuple({n: statistics.median(v) for n, v in x.items()} for x in (seconds, ratios))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", default="8,32,128")
    parser.add_argument("--mixtures", default="1,4,8")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    args = parser.parse_args()
    cfg = base.get_config()
    cfg.model.update({"dim": args.dim, "num_layers": args.layers, "hidden_dim": 11 * args.dim // 4})
    shared = jax.jit(build.base_model(cfg).init)(jax.random.key(0))
    names = ("merge_many", "merge", "tensordot", "loop", "blocks")
    copy = copy_seconds(1 << 28)
    print(f"{'dtype':<10}{'E':>4}{'M':>3}" + "".join(f"{name:>18}" for name in names))
    print(f"{'':<17}" + f"{'ms  / floor':>18}" * len(names), flush=True)
    for dtype in args.dtypes.split(","):
        for num_experts in (int(e) for e in args.experts.split(",")):

            def stack(x, num_experts=num_experts, dtype=dtype):
                return jax.random.normal(jax.random.key(1), (num_experts, *x.shape)).astype(dtype)

            bank = jax.jit(functools.partial(jax.tree.map, stack))(shared)
            for num_mixtures in (int(m) for m in args.mixtures.split(",")):
                alpha_ME = jax.random.normal(jax.random.key(2), (num_mixtures, num_experts))
                found = measure(shared, bank, alpha_ME, copy=copy, rounds=args.rounds)
                cells = [
                    f"{1e3 * found[0][n]:10.1f}{found[1][n]:8.2f}" if n in found[0] else f"{'':>18}"
                    for n in names
                ]
                print(f"{dtype:<10}{num_experts:>4}{num_mixtures:>3}" + "".join(cells), flush=True)
    print(
        f"copying: {statistics.median(copy() for _ in range(5)) / 1e9:.1f} GB/s, read and written"
    )


if __name__ == "__main__":
    main()
