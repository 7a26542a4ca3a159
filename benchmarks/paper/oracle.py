"""The soup as a mixture oracle: does Theta(h) predict the model that pretraining on mix(h) gives?

    python benchmarks/paper/oracle.py --data=DATA --out=paper

Trains a model (`fixed` of experiments/paper/methods.py) on each of 24 mixtures: eight drawn as the
soup's meta-distribution draws, eight histograms of specialists, and eight extremes (six domains
alone, the natural frequencies, all domains alike). Beside their losses on the generic validation
text and on every specialist's documents stand

    soup       the loss of the soup of as many tokens, merged at the same h
    regression RegMix: 24 models on other mixtures, of a soup's tokens in all, and on their losses a
               ridge regression from h for each set, its strength chosen by leaving one out

with the rank correlation over the mixtures (Spearman), and the error that is left after a straight
line (prediction to loss, fitted on the mixtures themselves for both). `--mix=1` adds models trained
on what `soup-jax mix` finds for each of eight specialists, against the natural frequencies and the
histogram.
"""

import json

import numpy as np
import study as study_lib
import variants
from scipy import stats
from sklearn.linear_model import RidgeCV

from soup_jax import storage as files
from soup_jax.data.meta_distribution import from_config

NUM_DOMAINS = 64
PROXIES = 24


def mixtures(study, seed):
    """{name: h_K} of 24."""
    corpus = study.corpus(NUM_DOMAINS)
    g = corpus.domain_frequencies
    found = {f"pi{i}": h for i, h in enumerate(drawn(study, 8, seed))}
    h = study.h(NUM_DOMAINS)
    found |= {name: h[name] for name in list(study.sets())[::2][:8]}
    large = np.argsort(-g)[np.linspace(0, len(g) - 1, 6).astype(int)]
    found |= {f"domain{k}": np.eye(NUM_DOMAINS)[k] for k in large}
    return found | {"natural": g, "alike": (g > 0) / (g > 0).sum()}


def drawn(study, number, seed):
    """Domain weights as the soup's config draws them."""
    cfg = study.config
    pi = from_config(cfg.domain_weights, study.corpus(NUM_DOMAINS).domain_frequencies)
    rng = np.random.default_rng([seed, number])
    found = []
    for step in range(number):
        h_K = np.zeros(NUM_DOMAINS)
        pi.draw(rng, step, h_K)
        found.append(h_K / h_K.sum())
    return found


def losses(study, chosen, tag, steps, seed):
    """{mixture: {set: loss}} of a model trained on each."""
    paths = {n: study.weights(f"{tag}-{n}", NUM_DOMAINS, h_K) for n, h_K in chosen.items()}
    made = study.train(
        f"oracle-{tag}-{steps}-{seed}",
        "fixed",
        seeds=[seed],
        axes={"domain_weights.path": list(paths.values())},
        num_steps=steps,
        optimizer__warmup_steps=min(100, max(steps // 10, 1)),
        checkpoint__every_steps=0,
        loader__num_threads=1,
    )
    return {n: study.scores(made[(seed, p)], "specialist") for n, p in paths.items()}


def predicted(study, run, chosen):
    """{mixture: {set: loss}} of a soup, merged at each."""
    path = run / "oracle.json"
    if path.exists():
        return json.loads(path.read_text())
    soup, out = study.open(run).resident(), {}
    for name, h_K in chosen.items():
        theta = soup.on_devices(soup.coefficients(np.asarray(h_K)[None])[0])
        out[name] = {
            s: study_lib.mean_loss(soup.model, theta, study.windows(s))
            for s in [*study.sets(), study_lib.VALIDATION]
        }
    files.write_json(path, out)
    return out


def regression(study, chosen, steps, seed):
    """{mixture: {set: loss}} by ridge regression on proxies of `steps` in all."""
    proxies = {f"proxy{i}": h for i, h in enumerate(drawn(study, PROXIES, seed + 1000))}
    known = losses(study, proxies, "proxy", max(steps // PROXIES, 1), seed)
    x = np.stack(list(proxies.values()))
    wanted = np.stack(list(chosen.values()))
    out = {name: {} for name in chosen}
    for s in [*study.sets(), study_lib.VALIDATION]:
        y = np.array([known[p][s] for p in proxies])
        model = RidgeCV(np.logspace(-4, 2, 25)).fit(x, y)
        for name, value in zip(chosen, model.predict(wanted)):
            out[name][s] = float(value)
    return out


def compare(study, real, guess):
    """{set: (rank correlation, error after a straight line)}."""
    out = {}
    for s in [*study.sets(), study_lib.VALIDATION]:
        y = np.array([real[n][s] for n in real])
        x = np.array([guess[n][s] for n in real])
        rest = y - np.polyval(np.polyfit(x, y, 1), x)
        out[s] = (float(stats.spearmanr(x, y).statistic), float(np.sqrt((rest**2).mean())))
    return out


def by_mix(study, run, steps, seed):
    """Print losses of models trained on what `soup-jax mix` finds."""
    names = list(study.sets())[::2][:8]
    folder = study.out / "mix"
    folder.mkdir(exist_ok=True)
    found = {}
    for name in names:
        out = folder / f"{name}-{seed}.json"
        if not out.exists():
            texts = folder / f"{name}.jsonl"
            lines = [json.dumps({"text": t}) for t in study.sets()[name].for_h]
            texts.write_text("\n".join(lines) + "\n")
            study.command("mix", f"--run={run}", f"--target={texts}", f"--out={out.absolute()}")
        found[name] = np.array(json.loads(out.read_text()))
    made = losses(study, found, f"mix{seed}", steps, seed)
    return {name: made[name][name] for name in names}


def main():
    given = study_lib.arguments(__doc__, steps=(1220, "of every model"), mix=(0, "1: train on mix"))
    study = study_lib.Study(given)
    seed, steps = study.seeds[0], given.steps
    chosen = mixtures(study, seed)
    _, crisp = variants.references(study, [seed], {"num_steps": steps})
    others = {n: h for n, h in chosen.items() if n not in study.sets()}
    real = losses(study, others, "mixture", steps, seed)
    real = {
        n: real[n] if n in real else study.scores(crisp[(seed, n)], "specialist") for n in chosen
    }
    common = {"num_steps": steps, "loader__num_threads": 1, "checkpoint__every_steps": 0}
    run = study.train(f"soup-num_steps={steps}", "soup", seeds=[seed], **common)[(seed,)]
    guesses = {
        "soup": predicted(study, run, chosen),
        "regression": regression(study, chosen, steps, seed),
    }
    found = {name: compare(study, real, guess) for name, guess in guesses.items()}
    result = {"mixtures": {n: list(map(float, h)) for n, h in chosen.items()}, "real": real}
    result |= {"predicted": guesses, "compared": found}
    print("| set | soup: rank correlation | error | regression | error | spread of losses |")
    print("| --- " * 6 + "|")
    for s in [*study.sets(), study_lib.VALIDATION]:
        cells = [f"{x:.3f}" for name in guesses for x in found[name][s]]
        spread = np.std([real[n][s] for n in real])
        print(f"| {s} | " + " | ".join(cells) + f" | {spread:.3f} |")
    for name, one in found.items():
        mean = np.mean([one[s][0] for s in study.sets()])
        print(f"{name}: rank correlation, mean over the specialist sets: {mean:.3f}")
    if given.mix:
        mixed = by_mix(study, run, steps, seed)
        result["mix"] = mixed
        print("| set | natural | histogram | mix |\n| --- | --- | --- | --- |")
        for name, loss in mixed.items():
            print(f"| {name} | {real['natural'][name]:.4f} | {real[name][name]:.4f} | {loss:.4f} |")
    files.write_json(study.out / "oracle.json", result)


if __name__ == "__main__":
    main()
