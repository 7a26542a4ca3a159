"""Loss of specialists by the number of their documents: histogram, search, fine-tuning.

    python benchmarks/search.py --run=RUN --specialists='DIR/*.jsonl' --documents=5,20,100,0

Each file's documents are split as `soup-jax evaluate` splits them: a sample of those that give h
(0: all of them) goes to each method, and the final part is scored. `histogram` is what
`instantiate` does, `alpha` and `h` are `--method=search` over coefficients and over domain weights,
`finetuned` trains the histogram's specialist on the sample. The table has nats per token, averages
over the sets; gains over the histogram are of the same sample, and the worst is of the set that
lost most.
"""

import argparse
import json
import pathlib
import time

import numpy as np

from soup_jax.data.domain_histogram import document_histogram
from soup_jax.evaluation.sample import read_sample
from soup_jax.evaluation.sets import document_sets, pack, part_fraction
from soup_jax.hardware import compile_cache
from soup_jax.specialists.finetune import finetune
from soup_jax.specialists.open import load
from soup_jax.specialists.search import mean_loss, search

METHODS = ("generic", "histogram", "alpha", "h", "finetuned")


def parts(soup, path: str) -> tuple[list[str], list[str]]:
    """Texts that give h, and the final ones without those in the training text."""
    documents = read_sample([path], text_field=soup.cfg.corpus.text_field).documents
    place = [(d, part_fraction(d.hash)) for d in documents]
    end_h = soup.cfg.evaluate.histogram_fraction
    final = [d for d, at in place if at >= end_h + soup.cfg.evaluate.tuning_fraction]
    known = soup.corpus.trained_on([d.hash for d in final])
    scored = [d.text for i, d in enumerate(final) if known is None or not known[i]]
    return [d.text for d, at in place if at < end_h], scored


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", required=True)
    parser.add_argument("--specialists", required=True)
    parser.add_argument("--corpus", default="", help="if it was moved")
    parser.add_argument("--documents", default="5,20,100,0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--max_windows", type=int, default=64, help="scored per set")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("search.jsonl"))
    given = parser.parse_args()
    compile_cache.enable()
    soup, methods = load(given.run, corpus_dir=given.corpus), given.methods.split(",")
    tokenizer = soup.map.tokenizer()
    settings = {"eos_id": soup.map.eos_id, "seq_len": soup.cfg.seq_len}
    sets = {n: parts(soup, p) for n, p in document_sets([given.specialists]).items()}
    scored = {
        n: pack(tokenizer, final, max_windows=given.max_windows, **settings)
        for n, (_, final) in sets.items()
    }

    def losses(models) -> np.ndarray:
        return np.array(
            [mean_loss(soup.model, m.params, s) for m, s in zip(models, scored.values())]
        )

    for number in map(int, given.documents.split(",")):
        rows: dict[str, list[np.ndarray]] = {method: [] for method in methods}
        seconds = dict.fromkeys(methods, 0.0)
        for seed in range(given.seeds if number else 1):
            rng = np.random.default_rng([seed, number])
            texts = []
            for for_h, _ in sets.values():
                order = rng.permutation(len(for_h))[: number or len(for_h)]
                texts.append([for_h[i] for i in order])
            h_MK = np.stack([document_histogram(soup.map, t).h_K for t in texts])
            start = soup.at_each(h_MK)
            for method in methods:
                begin = time.monotonic()
                if method == "generic":
                    models = [soup.generic()] * len(sets)
                elif method == "histogram":
                    models = start
                elif method == "finetuned":
                    rate = given.learning_rate
                    models = [
                        finetune(m, t, learning_rate=rate, say=lambda _: None) if len(t) > 1 else m
                        for m, t in zip(start, texts)
                    ]
                else:
                    found = search(soup, texts, h_MK, over=method, seed=seed)
                    models = soup.make(h_MK, np.stack([f.alpha_E for f in found]))
                seconds[method] += time.monotonic() - begin
                rows[method].append(losses(models))
            with given.log.open("a") as f:
                line = {m: r[-1].tolist() for m, r in rows.items()}
                f.write(json.dumps({"documents": number, "seed": seed, "losses": line}) + "\n")
        samples = f"{len(rows[methods[0]])} samples of each of {len(sets)} sets"
        print(f"\n{number or 'all'} documents, {samples}")
        print("| method | loss | gain over the histogram | worst set | sets that lost | s a set |")
        print("| --- | --- | --- | --- | --- | --- |")
        for method in methods:
            loss_RS = np.stack(rows[method])
            gain_RS = np.stack(rows["histogram"]) - loss_RS
            worst = np.unravel_index(gain_RS.argmin(), gain_RS.shape)
            name = list(sets)[worst[1]]
            took = seconds[method] / gain_RS.size
            print(
                f"| {method} | {loss_RS.mean():.4f} | {gain_RS.mean():+.4f} | {gain_RS.min():+.4f} "
                f"({name}) | {(gain_RS < -5e-5).sum()} of {gain_RS.size} | {took:.1f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
