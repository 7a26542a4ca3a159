"""Figure 5: fine-tuning from the soup's specialist and from the generic model, against tokens.

    python benchmarks/paper/figure5.py --data=DATA --out=paper

For each specialist the documents that give h are trained on, in windows, by AdamW at a constant
rate, all parameters; the documents of the final part are scored after 0, 1, 2, 4, ... steps of 16
windows. With `--text=corpus` it is windows of the corpus instead, drawn by the histogram as CRISP
draws them: what each specialist would cost that is trained on from there. Starts: the soup merged
at the histogram, and the generic model of as many pretraining tokens. After each number of steps a
start has the rate of --rates that is best there on the documents for tuning, in the mean over the
sets, with the first seed. Prints a table, and the tokens of fine-tuning that the generic model
needs to be as good as the specialist is without; keeps figure5-TEXT.json and .png in OUT.
"""

import functools
import json

import jax
import numpy as np
import optax
import study as study_lib

from soup_jax import storage as files
from soup_jax import tree
from soup_jax.data.loader import BatchSource
from soup_jax.evaluation.sets import pack
from soup_jax.experiments.paper import methods
from soup_jax.specialists.search import mean_loss
from soup_jax.training import build

ROWS = 16
STARTS = ("soup", "generic")
PARTS = ("tuning", "final")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(losses, optimizer, params, state, rows):
    def mean(params):
        found, weights = losses(params, rows)
        return (found * weights).sum() / weights.sum()

    updates, state = optimizer.update(jax.grad(mean)(params), state, params)
    return optax.apply_updates(params, updates), state


@functools.cache
def _adamw(rate):
    def matrices(params):
        return tree.map_named(lambda path, x: tree.is_matrix(path, x.ndim), params)

    return optax.adamw(rate, b2=0.95, weight_decay=0.1, mask=matrices)


def curve(model, params, fitted, scored, rate, steps):
    """{part: nats per token after each number of `steps`} on the rows `fitted[step]`."""
    optimizer = _adamw(rate)
    state = optimizer.init(params)
    out = {part: [] for part in scored}
    for step in range(max(steps) + 1):
        if step in steps:
            for part, windows in scored.items():
                out[part].append(mean_loss(model, params, windows))
        if step < max(steps):
            params, state = _step(model.example_losses, optimizer, params, state, fitted[step])
    return out


def of_documents(corpus, texts, steps, seed):
    """Rows for each step, from the windows of documents in one random order after another."""
    packed = pack(
        corpus.tokenizer(), texts, eos_id=corpus.eos_id, seq_len=corpus.seq_len, max_windows=0
    )
    number, rng = len(packed.tokens), np.random.default_rng(seed)
    epochs = -(-steps * ROWS // number)
    order = np.concatenate([rng.permutation(number) for _ in range(epochs)])
    return [
        {"tokens": packed.tokens[rows], "num_targets": packed.num_targets[rows]}
        for rows in order[: steps * ROWS].reshape(steps, ROWS)
    ]


def of_corpus(study, corpus, h_K, steps, seed):
    """Rows for each step, from the training windows of domains that are drawn by h."""
    cfg = methods.get_config(f"fixed,{study.given.size}")
    cfg.domain_weights.path = study.weights("fitted", h_K)
    cfg.batch_size, cfg.num_mixtures, cfg.seed = ROWS, 1, seed
    plan = build.sampling_plan(cfg, corpus)
    source = BatchSource(corpus, plan, rows=np.arange(ROWS), num_steps=steps)
    return [source[step].rows for step in range(steps)]


def curves(study, run, rate, steps, seed):
    """{set: {part: losses}} from the specialists of a run."""
    text = study.given.text
    windows = "".join(study.digest(name, part) for name in study.sets() for part in PARTS)
    key = files.sha256_bytes(windows.encode())[:8]
    path = run / f"figure5-{text}-{rate:g}-{max(steps)}-{key}.json"
    kept = json.loads(path.read_text()) if path.exists() else {}
    soup = study.open(run).resident()
    corpus, h = study.corpus(64), study.h(64)
    for name, one in study.sets().items():
        if name in kept:
            continue
        if text == "corpus":
            fitted = of_corpus(study, corpus, h[name], max(steps), seed + study_lib.OTHER_DATA)
        else:
            fitted = of_documents(corpus, one.for_h, max(steps), seed)
        params = study_lib.theta(soup, h[name]) if soup.num_experts else soup.params["shared"]
        scored = {part: study.windows(name, part) for part in PARTS}
        kept[name] = curve(soup.model, params, fitted, scored, rate, steps)
        files.write_json(path, kept)
    return kept


def main():
    given = study_lib.arguments(
        __doc__,
        pretraining=(610, "steps of both"),
        steps=(64, "of fine-tuning, at most"),
        rates=("1e-3,3e-3,1e-2", "of fine-tuning"),
        text=("documents", "that is fine-tuned on: documents or corpus"),
    )
    if given.text not in ("documents", "corpus"):
        raise SystemExit(f"--text={given.text}: documents or corpus")
    study = study_lib.Study(given)
    steps = [0, *(1 << i for i in range(given.steps.bit_length()))]
    rates = [float(rate) for rate in given.rates.split(",")]
    found, chosen = {}, {}
    for start in STARTS:
        runs = study.train(start, num_steps=given.pretraining)
        first = runs[(study.seeds[0],)]
        tried = {r: curves(study, first, r, steps, study.seeds[0]) for r in rates}
        mean = {r: np.mean([x["tuning"] for x in of.values()], axis=0) for r, of in tried.items()}
        best = np.argmin([mean[rate] for rate in rates], axis=0)
        chosen[start] = [rates[i] for i in best]
        print(start, "rates by steps:", dict(zip(steps, chosen[start])))
        found[start] = []
        for (seed,), run in runs.items():
            made = {r: curves(study, run, r, steps, seed) for r in set(chosen[start])}
            found[start].append(
                {
                    name: [made[r][name]["final"][i] for i, r in enumerate(chosen[start])]
                    for name in study.sets()
                }
            )
    report(study, steps, found, chosen)


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
        study.out / f"figure5-{study.given.text}.json",
        {"tokens": tokens.tolist(), "losses": found, "rates": rates, "needed": needed},
    )
    draw(tokens, mean, study.out / f"figure5-{study.given.text}.png")


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
