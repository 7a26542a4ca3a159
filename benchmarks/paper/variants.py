"""Soups that differ from experiments/paper/methods.py:soup in some fields: ablations, and the share
of CRISP's specialisation that each catches.

    python benchmarks/paper/variants.py --data=DATA --out=paper --group=router

Prints for each variant, means over seeds: the loss of the specialists, merged at the histogram; of
the same soup at the natural frequencies, and of S alone, on the same text; on generic validation
text; and the share: what the soup's specialists gain over a generic model of as many tokens, by
what CRISP gains: models trained on the histogram of one specialist each, for as many tokens each
(`--share=0` leaves it out). Both gains are sums over the specialists and the seeds; what is known
of each is kept in variants-GROUP.json, and drawn in variants-GROUP.png. Of the groups in SCALES,
whose variants are numbers, the gain over the natural frequencies is fitted by a straight line in
their logarithm.
"""

import numpy as np
import study as study_lib

from soup_jax import storage as files

RANK_8 = (("layers/(attention|mlp)/.*", "low_rank:8"), (".*", "none"))
GROUPS: dict[str, dict[str, dict]] = {
    "base": {"soup": {}},
    "router": {
        "mlp, ball, centroids": {},
        "linear": {"router__hidden_dim": 0},
        "random start": {"router__init": "random"},
        "none": {"router__normalization": "none"},
        "tanh": {"router__normalization": "tanh"},
        "l2": {"router__normalization": "l2"},
        "softmax": {"router__normalization": "softmax"},
        "not centred": {"router__center": False},
    },
    "leaves": {
        "all": {},
        "mlp": {"experts__rules": ((".*/mlp/.*", "dense"), (".*", "none"))},
        "attention": {"experts__rules": ((".*/attention/.*", "dense"), (".*", "none"))},
        "without embeddings": {"experts__rules": (("layers/.*", "dense"), (".*", "none"))},
        "rank 8": {"experts__rules": RANK_8},
    },
    "mixtures": {f"{m} a step": {"num_mixtures": m} for m in (16, 8, 4, 2, 1)},
    "start": {f"std {s:g}": {"experts__init_scale": s} for s in (0.0, 0.1, 0.3)},
    "bank_rate": {f"{s:g}": {"optimizer__bank_lr_scale": s} for s in (0.3, 0.1, 1.0, 3.0)},
    "bfloat16": {
        "float32": {},
        "bfloat16": {"experts__dtype": "bfloat16", "optimizer__moment_dtype": "bfloat16"},
    },
    "supports": {
        "1 to 16": {},
        "1 to 4": {"domain_weights__support_size": 4},
        "1": {"domain_weights__support_size": 1},
        "1 to 64": {"domain_weights__support_size": 64},
        "16": {"domain_weights__min_support_size": 16},
        "no generic": {"domain_weights__sparse": 1.0, "domain_weights__generic": 0.0},
        "half generic": {"domain_weights__sparse": 0.5, "domain_weights__generic": 0.5},
        "dirichlet": {"domain_weights__sparse": 0.0, "domain_weights__dirichlet": 0.8},
        "uniform supports": {"domain_weights__support_exponent": 0.0},
    },
    "experts": {f"{e} experts": {"num_experts": e} for e in (16, 1, 4, 64, 128)},
    "domains": {f"{k} domains": {"num_domains": k} for k in (64, 16, 256)},
    # As many experts as domains, so that each domain can have a direction of its own.
    "directions": {
        "16 experts": {},
        "64 experts": {"num_experts": 64},
        "64 experts, rate 1": {"num_experts": 64, "optimizer__bank_lr_scale": 1.0},
        "64 experts, 1 to 4": {"num_experts": 64, "domain_weights__support_size": 4},
        "64 experts, 1 to 4, rate 1": {
            "num_experts": 64, "domain_weights__support_size": 4, "optimizer__bank_lr_scale": 1.0,
        },
        "64 experts, 1, rate 1": {
            "num_experts": 64, "domain_weights__support_size": 1, "optimizer__bank_lr_scale": 1.0,
        },
    },
    "tokens": {f"{s} steps": {"num_steps": s} for s in (152, 305, 610, 1220, 2440)},
    # Of checkpoints; `average` is none of the config's fields.
    "averaging": {f"mean of {n}": {"average": n} for n in (1, 2, 4, 8)},
    # Equal bytes of the bank: dense ones of 0.24M numbers, or of rank 8, 20,480 each.
    "bytes": {
        "16 dense": {},
        "16 of rank 8": {"experts__rules": RANK_8},
        "186 of rank 8": {"experts__rules": RANK_8, "num_experts": 186},
    },
    # 20 tokens for each parameter of the base network, at a rate by its width.
    "sizes": {
        f"{name}M": {
            "num_steps": steps, "model__num_layers": layers, "model__dim": dim,
            "model__hidden_dim": 3 * dim, "model__num_heads": dim // 32,
            "model__num_kv_heads": dim // 32, "optimizer__learning_rate": 1.6e-2 * 64 / dim,
        }
        for name, layers, dim, steps in (
            ("0.24", 2, 64, 1162), ("0.56", 3, 96, 2718), ("1.1", 4, 128, 5446),
            ("2.0", 5, 160, 9734),
        )
    },
}  # fmt: skip

SCALES = ("experts", "domains", "tokens", "sizes")  # names begin with the number


def references(study, seeds, steps, crisp_seeds=()):
    """({seed: generic run}, {(seed, name): CRISP run}); a seed that is none of `crisp_seeds` has
    the CRISP runs of the first of them."""
    h = study.h(64)
    paths = {name: study.weights(name, h[name]) for name in study.sets()}
    generic = study.train("generic", seeds=seeds, num_steps=steps)
    axes = {"domain_weights.path": list(paths.values())}
    own = list(crisp_seeds) or seeds
    crisp = study.train("fixed", tag="-crisp", seeds=own, axes=axes, num_steps=steps)
    of = {s: s if s in own else own[0] for s in seeds}
    found = {(s, name): crisp[(of[s], path)] for s in seeds for name, path in paths.items()}
    return {s: generic[(s,)] for s in seeds}, found


def measure(study, run, seed, fields, *, share, average):
    """One soup's row."""
    row = {"seed": seed}
    columns = {}
    for column in ("specialist", "generic_h", "shared"):
        columns[column] = study.scores(run, column, average=average)
        row[column] = float(np.mean([v for n, v in columns[column].items() if n != "validation"]))
    row["validation"] = columns["generic_h"]["validation"]
    row["specialists"] = columns["specialist"]
    if share:
        own = [int(s) for s in filter(None, study.given.crisp_seeds.split(","))]
        generic, crisp = references(study, study.seeds, fields["num_steps"], own)
        base = study.scores(generic[seed], "specialist")
        row |= {"room": {}, "caught": {}, "generic": base["validation"]}
        for name in study.sets():
            own = study.scores(crisp[(seed, name)], "specialist", [name, "validation"])[name]
            row["room"][name] = base[name] - own
            row["caught"][name] = base[name] - columns["specialist"][name]
    return row


def main():
    given = study_lib.arguments(
        __doc__,
        group=("base", f"of {', '.join(GROUPS)}"),
        share=(1, "0: without CRISP"),
        steps=(610, "of every run"),
        crisp_seeds=("", "of CRISP, if not all of --seeds: it takes 16 runs a seed"),
    )
    study = study_lib.Study(given)
    rows, averaged = [], given.group == "averaging"
    for name, fields in GROUPS[given.group].items():
        fields = {"num_steps": given.steps} | fields
        average = fields.pop("average", 1)
        kept = {"checkpoint__every_steps": given.steps // 20, "checkpoint__keep_latest": 8}
        made = study.train("soup", fails=True, **(kept if averaged else {}), **fields)
        for (seed,), run in made.items():
            share = given.share and given.group not in ("averaging", "sizes")
            row = measure(study, run, seed, fields, share=share, average=average)
            rows.append({"variant": name} | row)
        if len(made) < len(study.seeds):
            print(f"{name}: {len(made)} of {len(study.seeds)} seeds were trained to the end")
        files.write_json(study.out / f"variants-{given.group}.json", rows)
    print(table(rows))
    if given.group in SCALES:
        print(fit(rows))
    print(draw(rows, study.out / f"variants-{given.group}.png"))


def share_of(rows):
    """What the soups of some rows catch of CRISP's gain, both summed over their sets."""
    return sum(sum(r["caught"].values()) for r in rows) / sum(sum(r["room"].values()) for r in rows)


def table(rows):
    """Markdown, means over seeds, in brackets largest less smallest."""
    keys = ("specialist", "generic_h", "shared", "validation")
    head = [*keys, "share"] if "room" in rows[0] else keys
    out = ["| variant | " + " | ".join(head) + " |", "| --- " * (len(head) + 1) + "|"]
    for name in dict.fromkeys(row["variant"] for row in rows):
        of_it = [row for row in rows if row["variant"] == name]
        cells = [(np.mean([r[k] for r in of_it]), [r[k] for r in of_it]) for k in keys]
        if "share" in head:
            cells.append((share_of(of_it), [share_of([r]) for r in of_it]))
        shown = [f"{mean:.4f} ({np.ptp(each):.3f})" for mean, each in cells]
        out.append(f"| {name} | " + " | ".join(shown) + " |")
    return "\n".join(out)


def fit(rows):
    """A line of text: gain = a + b log2(number), by least squares on the means over seeds."""
    names = list(dict.fromkeys(row["variant"] for row in rows))
    x = np.log2([float(name.split()[0].rstrip("M")) for name in names])
    gains = [[r["generic_h"] - r["specialist"] for r in rows if r["variant"] == n] for n in names]
    y = np.array([np.mean(of_one) for of_one in gains])
    slope, start = np.polyfit(x, y, 1)
    rest = ", ".join(f"{n} {r:+.4f}" for n, r in zip(names, y - (start + slope * x)))
    return f"gain = {start:.4f} + {slope:.4f} log2(number); left over: {rest}"


def draw(rows, path):
    """A point for each seed: specialists, and the same soup at the natural frequencies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    names = list(dict.fromkeys(row["variant"] for row in rows))
    figure, ax = plt.subplots(figsize=(6, 1 + 0.4 * len(names)), layout="constrained")
    for key, color in (("specialist", "C0"), ("generic_h", "C1")):
        y = [names.index(row["variant"]) for row in rows]
        ax.plot([row[key] for row in rows], y, "o", color=color, alpha=0.6, label=key)
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xlabel("nats per token, 16 specialist sets")
    ax.grid(axis="x", alpha=0.3)
    ax.legend()
    figure.savefig(path, dpi=110)
    return path


if __name__ == "__main__":
    main()
