"""Figure 4: specialist and generic loss of all methods at equal total budget, against tokens.

    python benchmarks/paper/figure4.py --data=DATA --out=paper

A method that trains several models pays for all of them: at a budget of T tokens CRISP trains one
model of T/16 for each of 16 specialists. Every point is a training of its own, with the whole of
its learning-rate schedule, so that budgets can be compared.

    generic            one model
    soup               Soup-of-Experts, merged at the histogram of each specialist
    per_window         a soup trained on one domain a row, merged for each window at the domain of
                       the window's own text, targets included (in the place of merging by sequence,
                       as in SMEAR and Lory); `_histogram`: merged at the histogram
    crisp              a model for each specialist, on its histogram
    crisp_branched     the same, each begun from a generic model of half of it (--start_share)
    experts_best       a model for each of 16 domains; the specialist takes that of its heaviest
    experts_tokens     their probabilities mixed by h (c-BTM, which weighs by context, has such a
                       mixture): a specialist costs 16 models to run
    experts_windows    the same, in which models that predicted the window so far weigh more
    experts_average    their parameters averaged by h
    experts_uniform    their parameters averaged
    branched_*         the same of domain experts that are so begun
    large              one model with as many parameters as the soup stores (--large=1)

`--tune=1` trains at rates around RATES instead, of each budget, with the first seed, and scores the
documents for tuning; a rate that is best at the edge goes on beyond it. Tables are printed, and
kept as figure4.json or tuning.json in OUT, with figure4.png. Seconds are those of training: give
--jobs=1 to compare them, so that no run has another beside it.
"""

import json

import numpy as np
import study as study_lib

from soup_jax import storage as files
from soup_jax.experiments.paper import methods as methods_lib

RATES = methods_lib.RATES | {
    "crisp": methods_lib.RATES["fixed"],
    "experts": methods_lib.RATES["fixed"],
    "crisp_branched": 8e-3,
    "branched": 8e-3,
}
BRANCHED = ("crisp_branched", "branched")
NUM_DOMAINS = 16  # and as many domain experts


def train(study, method, steps, seeds, rate):
    """[{name of a model: folder}] for each seed, of a budget of `steps`."""
    begun = int(study.given.start_share * steps) if method in BRANCHED else 0
    number = len(study.sets()) if method.startswith("crisp") else NUM_DOMAINS
    several = method in (*BRANCHED, "crisp", "experts")
    own = max((steps - begun) // number, 1) if several else steps
    fields = {"num_steps": own, "optimizer__learning_rate": rate}
    if not several:
        made = study.train(method, seeds=seeds, **fields)
        return [{"model": made[(seed,)]} for seed in seeds]
    if method.startswith("crisp"):
        h = study.h(64)
        paths = {name: study.weights(name, h[name]) for name in study.sets()}
    else:
        fields["num_domains"] = NUM_DOMAINS
        eye = np.eye(NUM_DOMAINS)
        paths = {k: study.weights(f"domain{k}", eye[k]) for k in range(NUM_DOMAINS)}
    found = []
    for i, seed in enumerate(seeds):
        data_seed = seed
        if begun:
            start = train(study, "generic", begun, seeds, RATES["generic"])[i]["model"]
            fields["checkpoint__init_from"] = str(start)
            data_seed = seed + study_lib.OTHER_DATA
        axes = {"domain_weights.path": list(paths.values())}
        made = study.train("fixed", tag=f"-{method}", seeds=[data_seed], axes=axes, **fields)
        found.append({name: made[(data_seed, path)] for name, path in paths.items()})
        if begun:
            found[-1]["begun from"] = start  # and paid for
    return found


def score(study, method, models, part):
    """{method: {"specialists": {name: loss}, "validation": loss or None}} of one seed."""
    names = list(study.sets(part))
    if "model" in models:
        return {name: _one(study, models["model"], c, part) for name, c in _columns(method).items()}
    if method.startswith("crisp"):
        made = [
            study.scores(models[n], "specialist", [n, study_lib.VALIDATION], part=part)
            for n in names
        ]
        general = float(np.mean([x[study_lib.VALIDATION] for x in made]))
        own = {name: x[name] for name, x in zip(names, made)}
        return {method: {"specialists": own, "validation": general}}
    return _experts(study, method, models, part)


def _columns(method):
    if method == "soup":
        return {"soup": "specialist", "soup_generic_h": "generic_h", "soup_shared": "shared"}
    if method == "per_window":
        return {"per_window": "windows", "per_window_histogram": "specialist"}
    return {method: "specialist"}


def _one(study, run, column, part):
    found = study.scores(run, column, part=part)
    return {"validation": found.pop(study_lib.VALIDATION), "specialists": found}


def _experts(study, method, models, part):
    windows = "".join(
        study.digest(name, part) for name in [*study.sets(part), study_lib.VALIDATION]
    )
    key = files.sha256_bytes(windows.encode())[:8]
    path = models[0].parent / f"experts-{part}-{key}-{models[0].name[-8:]}.json"
    if path.exists():
        return json.loads(path.read_text())
    soups = [study.open(models[k]) for k in range(NUM_DOMAINS)]
    model, params = soups[0].model, [s.resident().params["shared"] for s in soups]
    h = study.h(NUM_DOMAINS)
    out = {}
    uniform = study_lib.mean_params(params, np.full(NUM_DOMAINS, 1 / NUM_DOMAINS))
    for name in [*study.sets(part), study_lib.VALIDATION]:
        windows, h_K = study.windows(name, part), h[name]
        tokens, whole = study_lib.ensemble_losses(model, params, h_K, windows)
        losses = {
            "best": study_lib.mean_loss(model, params[int(h_K.argmax())], windows),
            "tokens": tokens,
            "windows": whole,
            "average": study_lib.mean_loss(model, study_lib.mean_params(params, h_K), windows),
            "uniform": study_lib.mean_loss(model, uniform, windows),
        }
        for kind, loss in losses.items():
            row = out.setdefault(f"{method}_{kind}", {"specialists": {}, "validation": None})
            if name == study_lib.VALIDATION:
                row["validation"] = loss
            else:
                row["specialists"][name] = loss
    files.write_json(path, out)
    return out


def seconds(models):
    """Of training, without starts and compiling, of all models together."""
    total = 0.0
    for run in models.values():
        for line in (run / "starts.jsonl").read_text().splitlines():
            total += json.loads(line)["seconds"].get("training", 0.0)
    return total


def tune(study, methods, budgets):
    """Print losses on the documents for tuning, at rates around RATES."""
    rows = []
    for steps, method in ((s, m) for s in budgets for m in methods):
        tried = {}
        rates = [RATES[method] / 2, RATES[method], RATES[method] * 2]
        while rates:
            rate = float(f"{rates.pop(0):.3g}")
            (models,) = train(study, method, steps, study.seeds[:1], rate)
            for name, one in score(study, method, models, "tuning").items():
                loss = float(np.mean(list(one["specialists"].values())))
                rows.append({"method": name, "rate": rate, "steps": steps, "loss": loss} | one)
                tried.setdefault(rate, loss)  # the first of a method's columns chooses
            best = min(tried, key=tried.__getitem__)
            if not rates and len(tried) < 6:
                edge = {min(tried): best / 2, max(tried): best * 2}
                rates = [edge[best]] if best in edge else []
    files.write_json(study.out / "tuning.json", rows)
    print("| budget, steps | method | rate | specialists, tuning part |\n" + "| --- " * 4 + "|")
    for row in rows:
        print(f"| {row['steps']} | {row['method']} | {row['rate']:g} | {row['loss']:.4f} |")


def main():
    given = study_lib.arguments(
        __doc__,
        budgets=("152,305,610", "steps of the whole budget; each a double of the one before"),
        methods=("generic,soup,per_window,crisp,crisp_branched,experts,branched", "of RATES"),
        large=(0, "1: the large model, too"),
        start_share=(0.5, "of the budget, for the generic model that branches begin from"),
        branch_rate=(RATES["crisp_branched"], "of crisp_branched and branched"),
        tune=(0, "1: rates instead"),
    )
    RATES.update(dict.fromkeys(BRANCHED, given.branch_rate))
    study = study_lib.Study(given)
    budgets = [int(b) for b in given.budgets.split(",")]
    methods = given.methods.split(",") + ["large"] * bool(given.large)
    if given.tune:
        tune(study, methods, budgets)
        return
    tokens = study.config.batch_size * study.config.seq_len
    rows = []
    for steps in budgets:
        for method in methods:
            made = train(study, method, steps, study.seeds, RATES[method])
            for seed, models in zip(study.seeds, made):
                took = seconds(models)
                for name, one in score(study, method, models, "final").items():
                    rows.append(
                        {"method": name, "tokens": steps * tokens, "seed": seed, "seconds": took}
                        | {"specialist": float(np.mean(list(one["specialists"].values())))}
                        | one
                    )
            files.write_json(study.out / "figure4.json", rows)
    print(table(rows))
    print(draw(rows, study.out / "figure4.png"))


def _of(rows, method, tokens, key):
    found = [r[key] for r in rows if (r["method"], r["tokens"]) == (method, tokens)]
    return None if not found or found[0] is None else np.array(found)


def table(rows):
    """Markdown: specialists and generic validation, means over seeds with their range."""
    budgets = sorted({r["tokens"] for r in rows})
    methods = list(dict.fromkeys(r["method"] for r in rows))
    head = [f"{t / 1e6:.2g}M" for t in budgets]
    out = ["| method | " + " | ".join(head) + " | validation |", "| --- " * (len(head) + 2) + "|"]
    for method in methods:
        cells = []
        for key, tokens in [*(("specialist", t) for t in budgets), ("validation", budgets[-1])]:
            x = _of(rows, method, tokens, key)
            cells.append("" if x is None else f"{x.mean():.4f} ({np.ptp(x):.3f})")
        out.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join([*out, "(nats per token; mean over seeds, in brackets largest less smallest)"])


def draw(rows, path):
    """Specialist and generic loss against tokens, specialist loss against seconds of training."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(15, 5), layout="constrained")
    budgets = sorted({r["tokens"] for r in rows})
    for number, method in enumerate(dict.fromkeys(r["method"] for r in rows)):
        style = {"color": f"C{number % 10}", "marker": "o", "markersize": 3}
        style |= {"linestyle": ("-", "--", ":")[number // 10 % 3]}
        for ax, key in ((axes[0], "specialist"), (axes[1], "validation"), (axes[2], "seconds")):
            what = "specialist" if key == "seconds" else key
            ys = [_of(rows, method, t, what) for t in budgets]
            if any(y is None for y in ys):
                continue
            xs = [t / 1e6 for t in budgets]
            if key == "seconds":
                xs = [float(np.mean(_of(rows, method, t, "seconds"))) for t in budgets]
            ax.plot(xs, [y.mean() for y in ys], label=method, **style)
            low, high = [y.min() for y in ys], [y.max() for y in ys]
            ax.fill_between(xs, low, high, color=style["color"], alpha=0.12)
    for ax, title, x in zip(
        axes,
        ("specialist sets, average", "generic validation text", "specialist sets, average"),
        ("million tokens, of all models", "million tokens, of all models", "seconds of training"),
    ):
        ax.set(title=title, xlabel=x, ylabel="nats per token", xscale="log")
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
