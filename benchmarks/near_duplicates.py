"""Near duplicates and contamination in real text: how many, how sure, how fast.

    python benchmarks/near_duplicates.py --sources=TEXT --evaluation='DIR/*.jsonl' --pairs=200

Reads the sources as `prepare` does and cleans them, and compares with exact Jaccard similarities of
the documents' sets of word 5-grams, which it computes by itself from the words:

    precision    of the documents that were dropped, of --pairs of them: the share that has an exact
                 similarity of at least 0.75 (and of at least the threshold) to the one kept
    recall       of pairs that have at least the threshold, among --documents of the sources: the
                 share whose later document was dropped

The estimate's standard error at a similarity of 0.8 is 0.04, so what lies that near to the
threshold falls to either side.
"""

import argparse
import collections
import itertools
import json
import pathlib
import re
import tempfile
import time

import joblib

from soup_jax.data import sources as corpus_lib
from soup_jax.data.damage import Report
from soup_jax.data.prepare import shards
from soup_jax.data.prepare.clean import DROPPED, NEAR_WORDS, clean, sign
from soup_jax.data.prepare.work import Work
from soup_jax.data.readers import text_hash
from soup_jax.experiments import base


def grams(text: str) -> frozenset[tuple[str, ...]]:
    """The set of word 5-grams, by Python's own idea of words."""
    words = re.findall(r"[^\W_]+", text.lower())
    return frozenset(
        tuple(words[i : i + NEAR_WORDS]) for i in range(max(len(words) - NEAR_WORDS + 1, 1))
    )


def jaccard(left: frozenset, right: frozenset) -> float:
    """Shared elements over all."""
    return len(left & right) / max(len(left | right), 1)


def all_texts(paths) -> list[str]:
    """The texts of document shards, in order."""
    loaded = (shards.load(path) for path in paths)
    return [text for s in loaded for text in shards.texts_of(s, range(len(s["split"])))]


def alike(sets: list[frozenset], threshold: float) -> dict[int, list[int]]:
    """Later document -> earlier ones of at least this similarity, by brute force over candidates.

    Two sets of similarity s share an element among the rarest (1 - s) of either's.
    """
    often = collections.Counter(itertools.chain.from_iterable(sets))
    holders, found = collections.defaultdict(list), collections.defaultdict(list)
    for i, own in enumerate(sets):
        rare = sorted(own, key=lambda gram: (often[gram], gram))
        rare = rare[: len(own) - int(threshold * len(own)) + 1]
        for j in {j for gram in rare for j in holders[gram]}:
            if jaccard(own, sets[j]) >= threshold:
                found[i].append(j)
        for gram in rare:
            holders[gram].append(i)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", required=True, help="files, folders or globs, with commas")
    parser.add_argument("--evaluation", default="")
    parser.add_argument("--threshold", type=float, default=0.8)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--documents", type=int, default=5000)
    parser.add_argument("--show", type=int, default=0, help="pairs to print")
    given = parser.parse_args()
    cfg = base.get_config()
    cfg.corpus.near_duplicates = given.threshold
    cfg.corpus.evaluation = tuple(filter(None, given.evaluation.split(",")))
    with tempfile.TemporaryDirectory() as folder:
        directory = pathlib.Path(folder)
        sources = corpus_lib.find_files(given.sources.split(","), Report())
        work = Work(cfg, directory, sources, {}, ("train",), joblib.cpu_count())
        reading = shards.Reading("text", 1, cfg.corpus.max_chars, 0, 0, work.splits)
        begin = time.perf_counter()
        shards.read_group(work.path / "documents", 0, sources, reading)
        read = time.perf_counter()
        texts = all_texts(work.shards("documents"))
        middle = time.perf_counter()
        sign(work)
        counts = clean(work)
        end = time.perf_counter()
        kept = set(all_texts(work.documents))
        told = json.loads((work.final / DROPPED).read_text())
    size = sum(len(text.encode()) for text in texts) / 1e6
    print(
        f"{len(texts):,} documents, {size:.0f} MB; {counts}; read in {read - begin:.0f} s, cleaned "
        f"in {end - middle:.0f} s: {size / (end - middle):.1f} MB/s on {work.num_workers} cores"
    )
    near = told["near_duplicates"]["examples"]
    for example in near[:: max(len(near) // given.show, 1)] if given.show else ():
        print(f"{example['similarity']}\n  {example['text']!r}\n  {example['kept']!r}")
    by_hash = {text_hash(text).hex(): text for text in texts}
    pairs = near[:: max(len(near) // given.pairs, 1)][: given.pairs]
    exact = [
        jaccard(grams(by_hash[pair["hash"]]), grams(by_hash[pair["kept_hash"]])) for pair in pairs
    ]
    shares = [sum(x >= least for x in exact) / max(len(exact), 1) for least in (0.75, 0.8)]
    print(
        f"precision: of {len(exact)} pairs {shares[0]:.1%} have at least 0.75, {shares[1]:.1%} at "
        f"least 0.8; the lowest {min(exact, default=1):.2f}"
    )
    some = texts[:: max(len(texts) // given.documents, 1)]
    sets = [grams(text) for text in some]
    for least in (given.threshold, 0.9):
        found = alike(sets, least)
        lost = sum(some[i] not in kept for i in found)
        print(
            f"recall: of {len(found)} documents with one before them of at least {least}, "
            f"{lost} were dropped"
        )


if __name__ == "__main__":
    main()
