"""Megabytes of text a second: `soup-jax prepare` phase by phase, beside the `tokenizers` library.

    python benchmarks/prepare.py [--mb=16] [--rounds=3] [--workers=0] [--dir=runs/prepare-benchmark]

    encode_batch         the library alone on all cores, texts in memory: what there is to reach
    encode_batch_fast    the same without offsets into the text
    tokenise             the tokenising part of phase `encode`, in prepare's own workers
    embed                its embedding part
    read .. manifest     the phases of one whole `prepare`, as prepare runs them

The text is what `launch/collect_text.py` finds on this machine. Everything is alternated round by
round; medians are printed, and ratios to `encode_batch` within a round. Fitting the tokenizer, the
embedder and k-means looks at a sample only, so that its share falls as a corpus grows.

With `--mb=8 --rounds=5` on two cores: `encode_batch_fast` 7.3 MB/s, `tokenise` 8.0, `encode` (both
of its parts, reading and writing) 5.6.
"""

import argparse
import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time

import common
import numpy as np

from soup_jax.data.corpus import open_corpus
from soup_jax.data.embed import parallel
from soup_jax.data.prepare import shards
from soup_jax.data.prepare import stages as prepare

PHASES = {
    "_hash": "hash the sources",
    "_read": "read, drop duplicates",
    "_fit_tokenizer": "fit the tokenizer",
    "_fit_embedder": "fit the embedder",
    "_encode": "encode (tokenise, embed)",
    "_fit_centroids": "fit the centroids",
    "_group": "group (assign)",
    "_write_windows": "write the windows",
    "describe_domains": "describe the domains",
    "write_manifest": "manifest",
}
LIBRARY = ("encode_batch", "encode_batch_fast")
_SHARD_DOCUMENTS = 256
_BATCH = 1024  # documents; what `encode_batch` answers takes far more memory than the text


def seconds(function, *args):
    begin = time.perf_counter()
    function(*args)
    return time.perf_counter() - begin


def texts_of(source):
    shard = shards.load(source)
    return list(shards.texts_of(shard, np.arange(len(shard["split"]))))


def tokenise(source, directory):
    """What a worker does with a shard to get its tokens."""
    tokenizer, _ = shards._tools(directory, "benchmark")
    shards.encode_tokens(tokenizer, texts_of(source))


def embed_texts(source, directory):
    """What a worker does with a shard to get its embeddings."""
    _, embedder = shards._tools(directory, "benchmark")
    embedder.embed(texts_of(source))


# In a process of its own, as one would use it: in this one the library reached less than half.
LIBRARY_PROCESS = """
import json, pathlib, sys, time, tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
texts = json.loads(pathlib.Path(sys.argv[2]).read_text())
for name in sys.argv[4:]:
    begin = time.perf_counter()
    for start in range(0, len(texts), int(sys.argv[3])):
        batch = texts[start : start + int(sys.argv[3])]
        getattr(tokenizer, name)(batch, add_special_tokens=False)
    print(time.perf_counter() - begin)
"""


def library(tokenizer, texts):
    """Seconds of each function of LIBRARY."""
    path = tokenizer.parent / "texts.json"
    path.write_text(json.dumps(texts))
    command = [sys.executable, "-c", LIBRARY_PROCESS, tokenizer, path, str(_BATCH), *LIBRARY]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    path.unlink()
    return dict(zip(LIBRARY, map(float, printed.split())))


def pieces(work):
    """Seconds of the parts of phase `encode`, and of the library alone, on the same documents."""
    sources = work.documents
    texts = [text for source in sources for text in texts_of(source)]
    result = library(work.final / "tokenizer.json", texts)
    for name, function in (("tokenise", tokenise), ("embed", embed_texts)):
        jobs = [(source, work.final) for source in sources]
        # Workers start and load their tools before the clock does.
        list(
            parallel.parallel_map(function, jobs[: work.num_workers], num_workers=work.num_workers)
        )
        done = parallel.parallel_map(function, jobs, num_workers=work.num_workers)
        result[name] = seconds(list, done)
    return result


def timed_phases(cfg):
    """Seconds of each phase of one `prepare`, and of the pieces in the middle of it."""
    spent, originals = {}, {name: getattr(prepare, name) for name in PHASES}

    def timing(name, function):
        def run(*args):
            if name == "_encode":
                spent.update(pieces(*args))
            begin = time.perf_counter()
            result = function(*args)
            spent[PHASES[name]] = time.perf_counter() - begin
            return result

        return run

    try:
        for name, function in originals.items():
            setattr(prepare, name, timing(name, function))
        prepare.prepare(cfg)
    finally:
        for name, function in originals.items():
            setattr(prepare, name, function)
    return spent


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/quickstart.py")
    parser.add_argument("--mb", type=float, default=16.0)
    parser.add_argument("--workers", type=int, default=0, help="0: one per core")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dir", type=pathlib.Path, default="runs/prepare-benchmark")
    return parser.parse_args()


def main():
    args = parse_args()
    text, corpus = args.dir / f"text-{args.mb:g}", args.dir / "corpus"
    collect = pathlib.Path(__file__).parents[1] / "launch" / "collect_text.py"
    command = [sys.executable, collect, "--out", text, "--max-mb", str(args.mb)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    # Many more shards than cores, as in a corpus for which time matters.
    shards.SHARD_DOCUMENTS = _SHARD_DOCUMENTS
    cfg = common.read_config(args.config)
    fields = {"corpus.sources": (str(text / "generic"),), "corpus.dir": str(corpus)}
    fields |= {"corpus.num_workers": args.workers or os.cpu_count()}
    cfg.update_from_flattened_dict(fields)
    rounds = []
    for _ in range(args.rounds):
        shutil.rmtree(corpus, ignore_errors=True)
        rounds.append(timed_phases(cfg))
    counts = open_corpus(corpus).manifest["counts"]["splits"].values()
    megabytes = sum(count["bytes"] for count in counts) / 1e6
    tokens = sum(count["tokens"] for count in counts)
    print(f"\n{megabytes:.1f} MB, {tokens:,} tokens, {fields['corpus.num_workers']} workers")
    print(f"{'':<28}{'seconds':>9}{'MB/s':>9}{'/ encode_batch':>16}")
    for name in rounds[0]:
        spent = statistics.median(values[name] for values in rounds)
        ratio = statistics.median(values["encode_batch"] / values[name] for values in rounds)
        print(f"{name:<28}{spent:>9.2f}{megabytes / spent:>9.2f}{ratio:>16.2f}")


if __name__ == "__main__":
    main()
