"""How the time of a train step grows with experts, domains, mixtures and window length.

    python benchmarks/growth.py [--config=experiments/minipile.py] [--out=docs/growth.png]

One field is varied at a time from the config's own values; its variants are alternated round by
round. Random tokens; no data is read. Prints a table and draws one panel a field; the dotted line
is the dense step of the same base network, measured in the same rounds.
"""

import argparse
import json
import pathlib
import statistics

import common
import matplotlib.pyplot as plt
from step import real_step, timed

PANELS = {  # field: (values, axis label)
    "num_experts": ((8, 16, 32, 64, 128), "experts"),
    "num_domains": ((64, 256, 1024, 4096), "domains"),
    "num_mixtures": ((1, 2, 4, 8, 16), "mixtures in a step"),
    "seq_len": ((64, 128, 256, 512), "tokens in a window"),
}


def panel(path, field, values, overrides, rounds):
    """Median milliseconds {value: {"soup": ms, "dense": ms}}."""
    runs = {}
    for value in values:
        for kind in ("soup", "dense"):
            cfg = common.read_config(path, overrides)
            cfg.update_from_flattened_dict({field: value})
            if kind == "dense":
                cfg.update_from_flattened_dict({"num_experts": 0, "num_mixtures": 1})
                if field != "seq_len" and value != values[0]:
                    continue  # the same step
            runs[value, kind], _ = real_step(common.build(cfg))
            timed(runs[value, kind])
    times = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            times[key].append(1e3 * timed(run))
    medians = {key: statistics.median(v) for key, v in times.items()}
    return {
        value: {
            "soup": medians[value, "soup"],
            "dense": medians.get((value, "dense"), medians[values[0], "dense"]),
        }
        for value in values
    }


def draw(results, out):
    """One panel a field, as a PNG."""
    figure, axes = plt.subplots(1, len(results), figsize=(3.2 * len(results), 3), sharey=False)
    for axis, (field, points) in zip(axes, results.items()):
        values = list(points)
        for kind, style in (("soup", "o-"), ("dense", ":")):
            axis.plot(values, [points[v][kind] for v in values], style, label=kind)
        axis.set_xscale("log", base=2)
        axis.set_xticks(values, [str(v) for v in values])
        axis.set_xlabel(PANELS[field][1])
        axis.set_ylim(bottom=0)
    axes[0].set_ylabel("ms a step")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=120)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/minipile.py")
    parser.add_argument("--out", type=pathlib.Path, default="docs/growth.png")
    parser.add_argument("--rounds", type=int, default=9)
    args, overrides = parser.parse_known_args()
    results = {}
    for field, (values, label) in PANELS.items():
        results[field] = panel(args.config, field, values, overrides, args.rounds)
        print(f"\n{label:<22}{'soup ms':>10}{'dense ms':>10}{'ratio':>8}")
        for value, ms in results[field].items():
            ratio = ms["soup"] / ms["dense"]
            print(f"{value:<22}{ms['soup']:>10.1f}{ms['dense']:>10.1f}{ratio:>8.2f}", flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    draw(results, args.out)
    args.out.with_suffix(".json").write_text(json.dumps(results, indent=1) + "\n")
    print(f"\npicture: {args.out}")


if __name__ == "__main__":
    main()
