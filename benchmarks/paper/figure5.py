"""Figure 5: fine-tuning from the soup's specialist and from the generic model, against tokens.

    python benchmarks/paper/figure5.py --data=DATA --out=paper

For each specialist the documents that give h are trained on, in windows, by AdamW at a constant
rate, all parameters; the documents of the final part are scored after 0, 1, 2, 4, ... steps of 16
windows. Starts: the soup merged at the histogram, and the generic model of as many pretraining
tokens (runs of figure4.py). Each has the rate of --rates that is best on the documents for tuning,
after the last step, in the mean over the sets. Prints a table, and the tokens of fine-tuning that
the generic model needs to be as good as the specialist is without; keeps figure5.json and
figure5.png in OUT.
"""

import functools
import json

import figure4
import jax
import numpy as np
import optax
import study as study_lib

from soup_jax import storage as files
from soup_jax.evaluation.sets import pack
from soup_jax.specialists.search import mean_loss

ROWS = 16
STARTS = ("soup", "generic")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(losses, optimizer, params, state, rows):
    def mean(params):
        found, weights = losses(params, rows)
        return (found * weights).sum() / weights.sum()

    updates, state = optimizer.update(jax.grad(mean)(params), state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def _adamw(rate):
    return optax.adamw(rate, b2=0.95, weight_decay=0.1)


def curve(model, params, fitted, scored, rate, steps, seed):
    """Nats per token after each number of `steps`."""
    optimizer = _adamw(rate)
    state, rng, out, order = optimizer.init(params), np.random.default_rng(seed), [], []
    for step in range(max(steps) + 1):
        if step in steps:
            out.append(mean_loss(model, params, scored))
        while len(order) < ROWS:
            order += rng.permutation(len(fitted.tokens)).tolist()
        rows, order = order[:ROWS], order[ROWS:]
        batch = {"tokens": fitted.tokens[rows], "num_targets": fitted.num_targets[rows]}
        if step < max(steps):
            params, state = _step(model.example_losses, optimizer, params, state, batch)
    return out


def curves(study, run, rate, steps, part, seed):
    """{set: losses} from the specialists of a run."""
    path = run / f"figure5-{part}-{rate:g}-{len(steps)}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    soup = study.open(run).resident()
    corpus, h = study.corpus(64), study.h(64)
    for name, one in study.sets(part).items():
        if name in kept:
            continue
        fitted = pack(
            corpus.tokenizer(),
            one.for_h,
            eos_id=corpus.eos_id,
            seq_len=corpus.seq_len,
            max_windows=0,
        )
        params = soup.params["shared"]
        if soup.num_experts:
            params = soup.on_devices(soup.coefficients(h[name][None])[0])
        kept[name] = curve(soup.model, params, fitted, one.scored, rate, steps, seed)
        files.write_json(path, kept)
    return kept


def main():
    given = study_lib.arguments(
        __doc__,
        pretraining=(1220, "steps of both"),
        steps=(256, "of fine-tuning, at most"),
        rates=("3e-4,1e-3,3e-3", "tried on the documents for tuning, with the first seed"),
    )
    study = study_lib.Study(given)
    steps = [0, *(1 << i for i in range(given.steps.bit_length()))]
    runs = {
        start: figure4.train(study, start, given.pretraining, study.seeds, figure4.RATES[start])
        for start in STARTS
    }
    found, rates = {start: [] for start in STARTS}, {}
    for start in STARTS:
        tried = {}
        for rate in map(float, given.rates.split(",")):
            run = runs[start][0]["model"]
            last = curves(study, run, rate, [0, max(steps)], "tuning", study.seeds[0])
            tried[rate] = float(np.mean([x[-1] for x in last.values()]))
        rates[start] = min(tried, key=tried.__getitem__)
        print(start, "rates:", ", ".join(f"{r:g} {x:.4f}" for r, x in tried.items()))
        for seed, models in zip(study.seeds, runs[start]):
            found[start].append(curves(study, models["model"], rates[start], steps, "final", seed))
    report(study, steps, found, rates)


def report(study, steps, found, rates):
    """Print the table, draw the picture, keep the numbers."""
    tokens = np.array(steps) * ROWS * study.config.seq_len
    names = list(study.sets())
    mean = {
        s: np.array([[d[n] for n in names] for d in found[s]]) for s in STARTS
    }  # seed, set, step
    print("| tokens | " + " | ".join(STARTS) + " |\n| --- " + "| --- " * len(STARTS) + "|")
    for i, t in enumerate(tokens):
        cells = [mean[s][:, :, i].mean(axis=1) for s in STARTS]
        print(f"| {t:,} | " + " | ".join(f"{x.mean():.4f} ({np.ptp(x):.3f})" for x in cells) + " |")
    needed = {}
    for j, name in enumerate(names):
        goal = mean["soup"][:, j, 0].mean()
        line = mean["generic"][:, j].mean(axis=0)
        below = np.flatnonzero(line <= goal)
        needed[name] = int(tokens[below[0]]) if len(below) else None
    print("tokens that the generic model needs to be as good as the specialist without any:")
    for name, number in needed.items():
        print(f"  {name}: " + (f"at most {number:,}" if number is not None else "more than tried"))
    files.write_json(
        study.out / "figure5.json",
        {"tokens": tokens.tolist(), "losses": found, "rates": rates, "needed": needed},
    )
    draw(tokens, mean, study.out / "figure5.png")


def draw(tokens, mean, path):
    """Mean over the sets, with the range of the seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for start in STARTS:
        y = mean[start].mean(axis=1)
        x = np.maximum(tokens, tokens[1] / 2)
        (line,) = ax.plot(x, y.mean(axis=0), marker="o", markersize=3, label=start)
        ax.fill_between(x, y.min(axis=0), y.max(axis=0), color=line.get_color(), alpha=0.15)
    ax.set(xscale="log", xlabel="tokens of fine-tuning (left: none)", ylabel="nats per token")
    ax.grid(alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
