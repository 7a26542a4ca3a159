"""The soup as a mixture oracle: does Theta(h) predict the model that pretraining on mix(h) gives?

    python benchmarks/paper/oracle.py --data=DATA --out=paper

Trains a model (`fixed` of experiments/paper/methods.py) on each of 24 mixtures: eight drawn as the
soup's meta-distribution draws sparse ones, eight histograms of specialists, and eight extremes (six
domains alone, the natural frequencies, all domains alike). Beside their losses on the generic
validation text and on every specialist's documents stand

    soup          the loss of the soup of as many tokens, merged at the same h
    regression n  RegMix: n models on other mixtures, of a soup's tokens in all, and on their losses
                  a ridge regression from h for each set, its strength chosen by leaving one out

with the rank correlation over the mixtures (Spearman), and the error that is left after a line that
does not fall, from prediction to loss, fitted on all mixtures but the one that is predicted. The
mixture of a set itself does not count for that set. Spread is the standard deviation. A
second table leaves out mixtures with a tenth of their weight on domains that the training sees more
than ten times. `--mix=1` adds models trained on what `soup-jax mix` finds for each of eight
specialists, against the natural frequencies and the histogram.
"""

import json

import numpy as np
import study as study_lib
import variants
from scipy import stats
from sklearn.linear_model import RidgeCV

from soup_jax import storage as files
from soup_jax.data.domain_report import MOST_EPOCHS
from soup_jax.data.meta_distribution import from_config

NUM_DOMAINS = 64


def mixtures(study, seed, few):
    """{name: h_K} of 24, or of the specialists alone."""
    g = study.corpus(NUM_DOMAINS).domain_frequencies
    h = study.h(NUM_DOMAINS)
    if few:
        return {name: h[name] for name in study.sets()}
    found = {f"sparse{i}": h for i, h in enumerate(drawn(study, 8, seed))}
    found |= {name: h[name] for name in list(study.sets())[::2][:8]}
    large = np.argsort(-g)[np.linspace(0, len(g) - 1, 6).astype(int)]
    found |= {f"domain{k}": np.eye(NUM_DOMAINS)[k] for k in large}
    return found | {"natural": g, "alike": (g > 0) / (g > 0).sum()}


def drawn(study, number, seed):
    """Domain weights as the sparse component of the soup's config draws them."""
    cfg = study.config.copy_and_resolve_references()
    cfg.domain_weights.update({"sparse": 1.0, "generic": 0.0})
    pi = from_config(cfg, study.corpus(NUM_DOMAINS).domain_frequencies)
    rng = np.random.default_rng([seed, number])
    found = []
    for step in range(number):
        h_K = np.zeros(NUM_DOMAINS)
        pi.draw(rng, step, h_K)
        found.append(h_K / h_K.sum())
    return found


def losses(study, chosen, tag, steps, seed):
    """{mixture: {set: loss}} of a model trained on each."""
    paths = {name: study.weights(name, h_K) for name, h_K in chosen.items()}
    axes = {"domain_weights.path": list(paths.values())}
    made = study.train("fixed", tag=f"-{tag}", seeds=[seed], axes=axes, num_steps=steps)
    return {name: study.scores(made[(seed, p)], "specialist") for name, p in paths.items()}


def predicted(study, run, chosen):
    """{mixture: {set: loss}} of a soup, merged at each."""
    windows = {s: study.digest(s) for s in scored(study)}
    text = files.json_text([windows, {n: list(h) for n, h in chosen.items()}])
    path = run / f"oracle-{files.sha256_bytes(text.encode())[:8]}.json"
    if path.exists():
        return json.loads(path.read_text())
    soup, out = study.open(run).resident(), {}
    for name, h_K in chosen.items():
        theta = study_lib.theta(soup, h_K)
        out[name] = {
            s: study_lib.mean_loss(soup.model, theta, study.windows(s)) for s in scored(study)
        }
    files.write_json(path, out)
    return out


def scored(study):
    """Names of what is scored."""
    return [*study.sets(), study_lib.VALIDATION]


def regression(study, chosen, number, steps, seed):
    """{mixture: {set: loss}} by ridge regression on proxies of `steps` in all."""
    proxies = {f"proxy{i}": h for i, h in enumerate(drawn(study, number, seed + 1000))}
    known = losses(study, proxies, f"proxy{number}", max(steps // number, 1), seed)
    x, wanted = np.stack(list(proxies.values())), np.stack(list(chosen.values()))
    out = {name: {} for name in chosen}
    for s in scored(study):
        y = np.array([known[p][s] for p in proxies])
        model = RidgeCV(np.logspace(-4, 2, 25)).fit(x, y)
        for name, value in zip(chosen, model.predict(wanted)):
            out[name][s] = float(value)
    return out


def compare(study, real, guess, names):
    """{set: (rank correlation, error after a line)}; a guess that is constant has no rank."""
    out = {}
    for s in scored(study):
        others = [n for n in names if n != s]
        y = np.array([real[n][s] for n in others])
        x = np.array([guess[n][s] for n in others])
        rest = [y[i] - _line(np.delete(x, i), np.delete(y, i), x[i]) for i in range(len(y))]
        rank = stats.spearmanr(x, y).statistic if np.ptp(x) else 0.0
        out[s] = (float(rank), float(np.sqrt(np.mean(np.square(rest)))))
    return out


def _line(x, y, at):
    slope = max(np.cov(x, y, bias=True)[0, 1] / max(x.var(), 1e-12), 0.0)
    return y.mean() + slope * (at - x.mean())


def repeats(study, h_K, steps):
    """Whether a tenth of the weight is on domains that are seen more than ten times."""
    windows = np.array([d["windows"]["train"] for d in study.corpus(NUM_DOMAINS).domains])
    times = steps * study.config.batch_size * h_K / np.maximum(windows, 1)
    return h_K[times > MOST_EPOCHS].sum() > 0.1


def by_mix(study, run, steps, seed):
    """{specialist: loss} of models trained on what `soup-jax mix` finds."""
    names = list(study.sets())[::2][:8]
    folder = study.out / "mix"
    folder.mkdir(exist_ok=True)
    found = {}
    for name in names:
        out = folder / f"{name}-{steps}-{seed}.json"
        if not out.exists():
            texts = folder / f"{name}.jsonl"
            lines = [json.dumps({"text": t}) for t in study.sets()[name].for_h]
            texts.write_text("\n".join(lines) + "\n")
            study.command("mix", f"--run={run}", f"--target={texts}", f"--out={out}")
        found[name] = np.array(json.loads(out.read_text()))
    made = losses(study, found, "mix", steps, seed)
    return {name: made[name][name] for name in names}


def main():
    given = study_lib.arguments(
        __doc__,
        steps=(610, "of every model"),
        proxies=("6,12,24", "numbers of models of the regressions; empty: none"),
        few=(0, "1: the histograms of all specialists instead, which need no further training"),
        mix=(0, "1: train on mix"),
    )
    study = study_lib.Study(given)
    seed, steps = study.seeds[0], given.steps
    chosen = mixtures(study, seed, given.few)
    _, crisp = variants.references(study, [seed], steps)
    others = {n: h for n, h in chosen.items() if n not in study.sets()}
    real = losses(study, others, "mixture", steps, seed) if others else {}
    real |= {n: study.scores(crisp[(seed, n)], "specialist") for n in chosen if n in study.sets()}
    run = study.train("soup", seeds=[seed], num_steps=steps)[(seed,)]
    guesses = {"soup": predicted(study, run, chosen)}
    for number in map(int, filter(None, given.proxies.split(","))):
        guesses[f"regression {number}"] = regression(study, chosen, number, steps, seed)
    result = {"mixtures": {n: list(map(float, h)) for n, h in chosen.items()}, "real": real}
    result |= {"predicted": guesses, "compared": {}}
    few = [n for n, h_K in chosen.items() if not repeats(study, h_K, steps)]
    for what, names in (("all", list(chosen)), ("not repeated", few)):
        found = {name: compare(study, real, guess, names) for name, guess in guesses.items()}
        result["compared"][what] = found
        print(f"\n{len(names)} mixtures ({what}); rank correlation and error in nats\n")
        print(table(study, real, names, found))
    if given.mix:
        mixed = by_mix(study, run, steps, seed)
        result["mix"] = mixed
        print("\n| set | natural | histogram | mix |\n| --- | --- | --- | --- |")
        for name, loss in mixed.items():
            print(f"| {name} | {real['natural'][name]:.4f} | {real[name][name]:.4f} | {loss:.4f} |")
    name = f"oracle-{'few-' * bool(given.few)}{steps}-{seed}.json"
    files.write_json(study.out / name, files.nulled(result))


def table(study, real, names, found):
    """Markdown: a line for each set, and the mean over the specialists'."""
    out = ["| set | spread | " + " | ".join(f"{n} | error" for n in found) + " |"]
    out.append("| --- " * (2 + 2 * len(found)) + "|")
    rows = {s: [x for one in found.values() for x in one[s]] for s in scored(study)}
    rows["mean of specialists"] = np.mean([rows[s] for s in study.sets()], axis=0)
    spread = {s: float(np.std([real[n][s] for n in names if n != s])) for s in scored(study)}
    spread["mean of specialists"] = np.mean([spread[s] for s in study.sets()])
    for s, cells in rows.items():
        out.append(f"| {s} | {spread[s]:.3f} | " + " | ".join(f"{x:.3f}" for x in cells) + " |")
    return "\n".join(out)


if __name__ == "__main__":
    main()
