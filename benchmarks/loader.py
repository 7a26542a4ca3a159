"""Windows per second of the loader and of its parts, on a synthetic corpus of its own.

    python benchmarks/loader.py [--domains=4096] [--seq_len=1024] [--batch=128]
        [--mixtures=1,8,128] [--threads=1,2] [--gigabytes=2] [--rounds=5] [--cold]

    sequential   records in file order, thousands a call, one thread: what the files can give
    read         `Corpus.read_windows` of planned batches, one thread
    plan         `SamplingPlan` alone
    batches      `loader.batches`: plan, grain and read, `--threads` reader threads
    waiting      share of its time that a consumer waits which takes a batch every `--step_ms`;
                 by default that is 5,000 windows a second

Everything is alternated round by round; medians are printed, and ratios to `sequential` within a
round. The corpus is in the real format, written by the project's own functions: domain sizes are
log-normal, tokens are drawn from Zipf's law. It is kept in `--dir`; `--cold` asks the system to
forget the files before each measurement, otherwise what fits is read from memory.
"""

import argparse
import itertools
import os
import pathlib
import statistics
import time

import common
import numpy as np
from array_record.python import array_record_module

from soup_jax import inputs
from soup_jax import storage as files
from soup_jax.data import loader, windows
from soup_jax.data import meta_distribution as domain_weights
from soup_jax.data.corpus import FORMAT_VERSION, fingerprint_of, open_corpus
from soup_jax.data.embed import parallel
from soup_jax.data.prepare import shards
from soup_jax.data.sampling import SamplingPlan

VOCAB_SIZE = 32_000
_SHARD_TOKENS = 1 << 26


def make_corpus(path, *, num_domains, seq_len, gigabytes):
    """Write a corpus with about so many bytes of tokens, unless it is there already."""
    request = {"num_domains": num_domains, "seq_len": seq_len, "gigabytes": gigabytes}
    if (path / "manifest.json").exists():
        if inputs.read_json(path / "manifest.json")["request"]["parameters"] != request:
            raise SystemExit(f"{path} was made with other arguments: delete it or choose --dir")
        return
    rng = np.random.default_rng(0)
    share_K = rng.lognormal(size=num_domains)
    size_K = np.maximum(1, share_K / share_K.sum() * _SHARD_TOKENS).astype(np.int64)
    probability_V = 1 / (np.arange(VOCAB_SIZE) + 3.0)
    # Drawn from a table of quantiles: a search per token would take a minute.
    quantiles = np.cumsum(probability_V) / probability_V.sum()
    table = np.searchsorted(quantiles, (np.arange(1 << 20) + 0.5) / (1 << 20)).astype("<u2")
    shard = path / "grouped.safetensors"
    tokens = table[rng.integers(0, len(table), size_K.sum(), np.int32)]
    starts = np.concatenate([[0], np.cumsum(size_K)])
    shards.save(shard, {"tokens": tokens, "starts": starts})
    # The same shard again and again: records are compressed one by one, so repetition over
    # gigabytes shows nowhere.
    repeats = max(1, round(gigabytes * 1e9 / tokens.nbytes))
    layout = windows.Layout.of(
        {"train": size_K * repeats}, seq_len=seq_len, vocab_size=VOCAB_SIZE, eos_id=0
    )
    (path / "windows").mkdir()
    jobs = [(path / "windows", file, layout, [shard] * repeats) for file in layout.files()]
    list(parallel.parallel_map(windows.write_window_file, jobs, num_workers=os.cpu_count()))
    windows.write_metadata(path / "windows", layout)
    tensors = {"offsets/train": layout.offsets["train"], "pad/train": layout.pad["train"]}
    shards.save(path / "offsets.safetensors", tensors)
    files.write_json(path / "domains.json", [{"label": str(k)} for k in range(num_domains)])
    shard.unlink()
    artefacts = {
        # No hash of gigabytes that nobody verifies.
        file.relative_to(path).as_posix(): {"bytes": file.stat().st_size, "sha256": file.name}
        for file in path.rglob("*")
        if file.is_file()
    }
    window_files = [{"name": f.name, "windows": f.stop - f.start} for f in layout.files()]
    for name in ("offsets.safetensors", "domains.json"):
        artefacts[name]["sha256"] = inputs.sha256_file(path / name)
    manifest = {"format": FORMAT_VERSION, "fingerprint": "", "eos_id": 0, "artefacts": artefacts}
    manifest["fingerprint"] = fingerprint_of(manifest)
    counts = {"documents": 0, "duplicates": 0, "too_short": 0, "cut": 0, "splits": {}}
    manifest |= {"seq_len": seq_len, "vocab_size": VOCAB_SIZE, "counts": counts}
    manifest |= {"window_files": {"train": window_files}}
    manifest |= {"request": {"parameters": request, "sources": []}}
    files.write_json(path / "manifest.json", manifest)


def window_paths(corpus):
    return [corpus.path / "windows" / f["name"] for f in corpus.manifest["window_files"]["train"]]


def forget(corpus):
    """Ask the system to drop the window files from its memory."""
    for path in window_paths(corpus):
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)  # pages that are not on disk yet would stay
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def make_plan(cfg, corpus, num_mixtures):
    return SamplingPlan(
        domain_weights.from_config(cfg, corpus.domain_frequencies),
        num_windows_K=np.diff(corpus.offsets["train"]),
        batch_size=cfg.batch_size,
        num_mixtures=num_mixtures,
        seed=0,
    )


def sequential(corpus, num_windows):
    """() -> windows per second of reading on and on in file order."""
    dtype = windows.token_dtype(corpus.vocab_size)

    def pieces():
        for path in itertools.cycle(window_paths(corpus)):
            reader = array_record_module.ArrayRecordReader(str(path))
            for start in range(0, reader.num_records() - 4096, 4096):
                yield reader.read(start, start + 4096)

    stream = pieces()

    def run():
        begin, done = time.perf_counter(), 0
        while done < num_windows:
            records = next(stream)
            data = np.frombuffer(b"".join(records), np.uint8).reshape(len(records), -1)
            data[:, -dtype.itemsize * (corpus.seq_len + 1) :].copy().view(dtype).astype(np.int32)
            done += len(records)
        return done / (time.perf_counter() - begin)

    return run


def plan_alone(plan, num_steps):
    """() -> windows per second that the plan names."""
    steps = itertools.count()

    def run():
        begin = time.perf_counter()
        for step in itertools.islice(steps, num_steps):
            plan[step]
        return num_steps * plan.batch_size / (time.perf_counter() - begin)

    return run


def read_alone(corpus, plan, num_steps):
    """() -> windows per second of reading what the plan names."""
    steps = itertools.count()

    def run():
        plans = [plan[step] for step in itertools.islice(steps, num_steps)]
        ids = [corpus.offsets["train"][p.domain_B] + p.window_B for p in plans]
        begin = time.perf_counter()
        for ids_B in ids:
            corpus.read_windows("train", ids_B)
        return num_steps * plan.batch_size / (time.perf_counter() - begin)

    return run


class EndToEnd:
    """One `loader.batches` that is taken from in turns, so that files are open and threads up."""

    def __init__(self, cfg, corpus, *, num_mixtures, num_threads):
        self.batch_size, self.prefetch = cfg.batch_size, cfg.loader.prefetch
        self.batches = loader.batches(
            corpus,
            make_plan(cfg, corpus, num_mixtures),
            rows=np.arange(cfg.batch_size),
            start_step=0,
            num_steps=1 << 40,
            num_threads=num_threads,
            prefetch=cfg.loader.prefetch,
        )

    def drain(self):
        # What was read ahead while others were measured must not count.
        for _ in range(self.prefetch + 1):
            next(self.batches)

    def rate(self, num_steps):
        """Windows per second taken as fast as they come."""
        self.drain()
        begin = time.perf_counter()
        for _ in range(num_steps):
            next(self.batches)
        return num_steps * self.batch_size / (time.perf_counter() - begin)

    def waiting(self, num_steps, step_seconds):
        """Share of the time that is spent in `next`, when a step takes so long."""
        self.drain()
        time.sleep(self.prefetch * step_seconds)  # a run starts with a full buffer
        waited, begin = 0.0, time.perf_counter()
        for _ in range(num_steps):
            before = time.perf_counter()
            next(self.batches)
            waited += time.perf_counter() - before
            time.sleep(step_seconds)
        return waited / (time.perf_counter() - begin)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="experiments/soup_110m.py", help="for its pi")
    parser.add_argument("--domains", type=int, default=4096)
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--mixtures", default="1,8,128")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--prefetch", type=int, default=16)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--step_ms", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cold", action="store_true")
    parser.add_argument("--dir", type=pathlib.Path, default="runs/loader-benchmark")
    return parser.parse_args()


def main():
    args = parse_args()
    begin = time.perf_counter()
    make_corpus(args.dir, num_domains=args.domains, seq_len=args.seq_len, gigabytes=args.gigabytes)
    corpus = open_corpus(args.dir)
    paths = window_paths(corpus)
    print(
        f"{corpus.offsets['train'][-1]:,} windows of {corpus.seq_len} in {len(paths)} files, "
        f"{sum(p.stat().st_size for p in paths) / 1e9:.2f} GB on disk, {corpus.num_domains} "
        f"domains; made or found in {time.perf_counter() - begin:.0f} s",
        flush=True,
    )
    cfg = common.read_config(args.config)
    cfg.update_from_flattened_dict({"batch_size": args.batch, "loader.prefetch": args.prefetch})
    step_seconds = args.step_ms / 1e3 or args.batch / 5000
    mixtures = [int(m) for m in args.mixtures.split(",")]
    threads = [int(n) for n in args.threads.split(",")]

    rates = {"sequential": sequential(corpus, args.batch * args.steps)}
    rates["read"] = read_alone(corpus, make_plan(cfg, corpus, mixtures[0]), args.steps)
    shares = {}
    for m in mixtures:
        rates[f"plan, {m} mixtures"] = plan_alone(make_plan(cfg, corpus, m), args.steps)
    for m, n in itertools.product(mixtures, threads):
        name = f"{m} mixtures, {n} threads"
        source = EndToEnd(cfg, corpus, num_mixtures=m, num_threads=n)
        rates[f"batches, {name}"] = lambda s=source: s.rate(args.steps)
        shares[f"waiting, {name}"] = lambda s=source: s.waiting(args.steps, step_seconds)

    results = {name: [] for name in rates | shares}
    for round_number in range(args.rounds + 1):
        for name, run in (rates | shares).items():
            if args.cold:
                forget(corpus)
            value = run()
            if round_number:  # the first round opens files and warms up
                results[name].append(value)
    print(f"\n{'':<36}{'windows/s':>11}{'M tokens/s':>12}{'/ sequential':>14}")
    for name in rates:
        rate = statistics.median(results[name])
        ratio = statistics.median(a / b for a, b in zip(results[name], results["sequential"]))
        print(f"{name:<36}{rate:>11,.0f}{rate * args.seq_len / 1e6:>12.2f}{ratio:>14.3f}")
    print(f"\nof a step of {1e3 * step_seconds:.1f} ms")
    for name in shares:
        print(f"{name:<36}{statistics.median(results[name]):>11.3%}")


if __name__ == "__main__":
    main()
