"""Loss of specialists by the number of their documents: histogram, search, fine-tuning.

    python benchmarks/search.py --run=RUN --specialists='DIR/*.jsonl' --documents=5,20,100,0

Each file's documents are split as `soup-jax evaluate` splits them: a sample of those that give h
(0: all of them) goes to each method, and the final part is scored. `histogram` is what
`instantiate` does, `alpha` and `h` are `--method=search` over coefficients and over domain weights,
`finetuned` trains the histogram's specialist on the sample. The table has nats per token, averages
over the sets; gains over the histogram are of the same sample, and the worst is of the set that
lost most.

A line of JSON for each sample goes to --log, and what is there already is not done again: so two
processes with `--samples=0` and `--samples=1` and a log each share the work, and

    python benchmarks/search.py --table LOG...

prints the table of several.
"""

import argparse
import itertools
import json
import pathlib
import time

import numpy as np

from soup_jax.data.domain_histogram import document_histogram
from soup_jax.evaluation.sets import document_sets, pack, split_documents
from soup_jax.hardware import compile_cache
from soup_jax.specialists.finetune import finetune
from soup_jax.specialists.open import load
from soup_jax.specialists.search import mean_loss, search

METHODS = ("generic", "histogram", "alpha", "h", "finetuned")


def table(logs: list[pathlib.Path]) -> str:
    """The lines of logs as tables in Markdown, one for each number of documents."""
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    out = []
    for number in sorted({line["documents"] for line in lines}, key=lambda n: n or 1 << 30):
        of_it = sorted(
            (line for line in lines if line["documents"] == number), key=lambda line: line["sample"]
        )
        sets = of_it[0]["sets"]
        out += [f"\n{number or 'all'} documents, {len(of_it)} samples of each of {len(sets)} sets"]
        out += [
            "| method | loss | gain over the histogram | worst set | sets that lost | s a set |"
        ]
        out += ["| --- | --- | --- | --- | --- | --- |"]
        for method in of_it[0]["losses"]:
            loss_RS, begin_RS = (
                np.array([line["losses"][name] for line in of_it]) for name in (method, "histogram")
            )
            gain_RS = begin_RS - loss_RS
            worst = sets[np.unravel_index(gain_RS.argmin(), gain_RS.shape)[1]]
            took = sum(line["seconds"][method] for line in of_it) / gain_RS.size
            out += [
                f"| {method} | {loss_RS.mean():.4f} | {gain_RS.mean():+.4f} | {gain_RS.min():+.4f} "
                f"({worst}) | {(gain_RS < -5e-5).sum()} of {gain_RS.size} | {took:.1f} |"
            ]
    return "\n".join(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run")
    parser.add_argument("--specialists")
    parser.add_argument("--corpus", default="", help="if it was moved")
    parser.add_argument("--documents", default="5,20,100,0")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--samples", default="0,1", help="numbers of samples; of all documents: 0")
    parser.add_argument("--max_windows", type=int, default=64, help="scored per set")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of fine-tuning")
    parser.add_argument("--log", type=pathlib.Path, default=pathlib.Path("search.jsonl"))
    parser.add_argument("--table", type=pathlib.Path, nargs="+", help="logs; runs nothing")
    given = parser.parse_args()
    if given.table:
        print(table(given.table))
        return
    compile_cache.enable()
    soup, methods = load(given.run, corpus_dir=given.corpus), given.methods.split(",")
    tokenizer = soup.map.tokenizer()
    settings = {"eos_id": soup.map.eos_id, "seq_len": soup.cfg.seq_len}
    sets = {
        n: split_documents(n, p, soup.corpus, soup.cfg)[:2]
        for n, p in document_sets([given.specialists]).items()
    }
    scored = {
        n: pack(tokenizer, final, max_windows=given.max_windows, **settings)
        for n, (_, final) in sets.items()
    }

    def made(method: str, texts: list[list[str]], h_MK: np.ndarray, start: list, sample: int):
        if method == "generic":
            return [soup.generic()] * len(sets)
        if method == "histogram":
            return start
        if method == "finetuned":
            rate = given.learning_rate
            return [
                finetune(m, t, learning_rate=rate, say=lambda _: None) if len(t) > 1 else m
                for m, t in zip(start, texts)
            ]
        found = search(soup, texts, h_MK, over=method, seed=sample)
        return soup.make(h_MK, np.stack([f.alpha_E for f in found]))

    done = set()
    if given.log.exists():
        lines = map(json.loads, given.log.read_text().splitlines())
        done = {(line["documents"], line["sample"]) for line in lines}
    for number, sample in itertools.product(
        map(int, given.documents.split(",")), map(int, given.samples.split(","))
    ):
        if (number, sample) in done or (sample and not number):
            continue
        rng = np.random.default_rng([sample, number])
        texts = []
        for for_h, _ in sets.values():
            order = rng.permutation(len(for_h))[: number or len(for_h)]
            texts.append([for_h[i] for i in order])
        h_MK = np.stack([document_histogram(soup.map, t).h_K for t in texts])
        start = soup.at_each(h_MK)
        line = {"documents": number, "sample": sample, "sets": list(sets)}
        line |= {"losses": {}, "seconds": {}}
        for method in methods:
            begin = time.monotonic()
            models = made(method, texts, h_MK, start, sample)
            line["seconds"][method] = time.monotonic() - begin
            line["losses"][method] = [
                mean_loss(soup.model, m.params, s) for m, s in zip(models, scored.values())
            ]
        with given.log.open("a") as f:
            f.write(json.dumps(line) + "\n")
    print(table([given.log]))


if __name__ == "__main__":
    main()
