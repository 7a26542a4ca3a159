"""Prepare a corpus: source files to token windows grouped by domain, in one restartable command.

1. sources    -> document shards   read, check, deduplicate, split (prepare/shards.py); in order
2. shards     -> tokenizer.json    BPE on train documents chosen by hash, or a given file
3. shards     -> embedder          fitted on train documents chosen by hash
4. shard      -> token ids + unit vectors per document; shards in parallel
5. vectors    -> centroids         k-means on the documents of 3
6. shard      -> token ids sorted by split and domain, document order kept; shards in parallel
7. all shards -> windows/          ArrayRecord files; files in parallel (data/corpus.py)
8.            -> domains.json, report.json and, last of all, manifest.json

A shard is 4,096 documents or 32 MB of text. Every output is a function of the config and of the
sources' bytes alone, not of the number of workers, and is written atomically under `<dir>/.work`;
a run that was killed continues after the last finished output and ends with the same bytes.

Memory: a few shards per worker; one window file (windows.FILE_BYTES) per worker; the texts of 3,
`embed.fit_documents` times at most `embed.max_chars`; and about 130 bytes per different document
for the set of hashes that finds duplicates (13 GB for 100 million documents). Disk, until it is
done: the text once, its tokens twice.

This is not the place for filtering by quality, near-duplicate search or languages: bring documents
that should be trained on.
"""

import contextlib
import dataclasses
import fcntl
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import joblib
import numpy as np
import tqdm

from soup_jax import storage as files
from soup_jax.data import corpus as windows
from soup_jax.data import domains
from soup_jax.data import sources as corpus_lib
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.embed import parallel
from soup_jax.data.embed.base import EMBEDDERS, load_embedder, save_embedder
from soup_jax.data.prepare import provenance as request_lib
from soup_jax.data.prepare import shards
from soup_jax.errors import UserError


def prepare(cfg: Any) -> windows.Corpus:
    """Prepare `cfg.corpus.dir` from `cfg.corpus.sources`; the finished folder is left alone.

    Raises:
      UserError: sources or settings that cannot work, or a folder made with other settings.
    """
    start = time.monotonic()
    request_lib.check(cfg)
    directory = pathlib.Path(cfg.corpus.dir)
    report = corpus_lib.Report()
    sources = corpus_lib.find_files(cfg.corpus.sources, report)
    request = request_lib.make_request(cfg, _progress(sources, "hashing the sources"))
    if (directory / "manifest.json").exists():
        return _finished(directory, request)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"cannot make the folder corpus.dir = {directory}: {e.strerror}") from e
    with _locked(directory):
        work = _start(cfg, directory, sources, request)
        # The manifest among the staged artefacts says that all of them are there; after that,
        # moving them is all that is left, whenever the run is killed.
        if not (work.final / "manifest.json").exists():
            totals = _read(work, report)
            _fit_tokenizer(work)
            _fit_embedder(work)
            _encode(work)
            _fit_centroids(work)
            _group(work)
            layout = _write_windows(work)
            _describe_domains(work, layout)
            _manifest(work, layout, totals, report)
        _publish(work)
    corpus = windows.open_corpus(directory)
    print("\n".join(corpus.summary()))
    _say(f"done in {time.monotonic() - start:.0f} s")
    return corpus


@dataclasses.dataclass(frozen=True)
class _Work:
    """What every stage needs to know."""

    cfg: Any
    directory: pathlib.Path
    sources: Sequence[corpus_lib.SourceFile]
    request: dict[str, Any]
    splits: tuple[str, ...]
    num_workers: int

    @property
    def path(self) -> pathlib.Path:
        """Intermediate outputs; removed at the end."""
        return self.directory / ".work"

    @property
    def final(self) -> pathlib.Path:
        """Finished artefacts, moved to `directory` at the end."""
        return self.path / "final"

    def shards(self, kind: str) -> list[pathlib.Path]:
        """The paths of one kind of output for every document shard, in order."""
        names = sorted(path.name for path in (self.path / "documents").glob("*.safetensors"))
        return [self.path / kind / name for name in names]


def _finished(directory: pathlib.Path, request: dict[str, Any]) -> windows.Corpus:
    corpus = windows.open_corpus(directory)
    differences = request_lib.differences(corpus.manifest["request"], request)
    if differences:
        raise UserError(
            f"{directory} was prepared from other settings or sources ({'; '.join(differences)}). "
            "Choose another --config.corpus.dir, or delete the folder to prepare it anew"
        )
    shutil.rmtree(directory / ".work", ignore_errors=True)  # killed between manifest and tidying
    _say(f"{directory} is already prepared")
    return corpus


@contextlib.contextmanager
def _locked(directory: pathlib.Path) -> Iterator[None]:
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            raise UserError(f"another `soup-jax prepare` is at work in {directory}") from e
        yield
    finally:
        os.close(handle)  # and with it the lock, as when the process dies


def _start(
    cfg: Any,
    directory: pathlib.Path,
    sources: Sequence[corpus_lib.SourceFile],
    request: dict[str, Any],
) -> _Work:
    present = os.listdir(directory)
    if present and ".work" not in present:
        raise UserError(
            f"{directory} is neither empty nor a prepared corpus (it holds {present[0]!r}): choose "
            "another --config.corpus.dir"
        )
    record = directory / ".work" / "request.json"
    if record.exists():
        old = files.read_json(record)
        differences = request_lib.differences(old, request)
        if old["format"] != request["format"]:
            differences.append(f"format: {old['format']}, now {request['format']}")
        if differences:
            _say(f"unfinished work is dropped, it was for other settings: {'; '.join(differences)}")
            record.unlink()  # first, so that half-deleted work is never continued
        else:
            _say("continuing the unfinished work of an earlier run")
    if not record.exists():
        shutil.rmtree(record.parent, ignore_errors=True)
        files.write_json(record, request)
    splits = ["train", "validation"]
    if cfg.corpus.held_out_fraction > 0:
        splits.append("held_out")
    # joblib's count respects what a container or a batch system has granted.
    num_workers = cfg.corpus.num_workers or joblib.cpu_count()
    return _Work(cfg, directory, sources, request, tuple(splits), num_workers)


# Stage 1


def _read(work: _Work, report: corpus_lib.Report) -> dict[str, int]:
    totals = shards.write_documents(
        work.path / "documents",
        work.cfg.corpus,
        work.sources,
        work.splits,
        report,
        lambda documents: _progress(documents, "reading documents"),
    )
    num_documents = sum(
        np.count_nonzero(shards.load(path, "split")["split"] == 0)
        for path in work.shards("documents")
    )
    if num_documents < work.cfg.num_domains:
        raise UserError(
            f"the sources hold {num_documents} train documents, fewer than num_domains = "
            f"{work.cfg.num_domains}: add sources or lower --config.num_domains"
        )
    return totals


# Stages 2, 3 and 5: what is fitted on a sample


def _fit_tokenizer(work: _Work) -> None:
    path = work.final / "tokenizer.json"
    if path.exists():
        return
    cfg = work.cfg
    if cfg.tokenizer.path:
        tokenizer = tokenizer_lib.load_tokenizer(cfg.tokenizer.path)
        _say(f"took the tokenizer {cfg.tokenizer.path}: {tokenizer.vocab_size} tokens")
    else:
        documents = work.shards("documents")
        rows = shards.choose(documents, num_bytes=cfg.tokenizer.train_bytes)
        texts = _progress(shards.chosen_texts(documents, rows), "training the tokenizer")
        tokenizer = tokenizer_lib.train_tokenizer(texts, cfg.vocab_size)
        if tokenizer.vocab_size < cfg.vocab_size:
            _say(
                f"the text gives only {tokenizer.vocab_size} tokens, not vocab_size = "
                f"{cfg.vocab_size}; the rest of the model's vocabulary will be unused"
            )
    tokenizer.save(path)


def _fit_embedder(work: _Work) -> None:
    if (work.final / "embedder.json").exists():
        return
    cfg = work.cfg.embed
    documents = work.shards("documents")
    rows = shards.choose(documents, num_documents=cfg.fit_documents)
    texts = _progress(shards.chosen_texts(documents, rows, cfg.max_chars), "fitting the embedder")
    embedder = EMBEDDERS.get(cfg.kind).fit(cfg, list(texts), num_workers=work.num_workers)
    save_embedder(embedder, work.final, kind=cfg.kind)


def _fit_centroids(work: _Work) -> None:
    path = work.path / "centroids.safetensors"
    if path.exists():
        return
    _say(f"cutting the corpus into {work.cfg.num_domains} domains")
    rows = shards.choose(work.shards("documents"), num_documents=work.cfg.embed.fit_documents)
    embeddings = shards.chosen_rows(work.shards("encoded"), rows, "embeddings")
    shards.save(path, {"centroids": domains.fit_centroids(embeddings, work.cfg.num_domains)})


# Stages 4 and 6: one shard each


def _encode(work: _Work) -> None:
    jobs = []
    version = files.sha256_file(work.final / "tokenizer.json")
    version += files.sha256_file(work.final / "embedder.json")
    for source, target, later in zip(*map(work.shards, ("documents", "encoded", "grouped"))):
        if not target.exists() and not later.exists():
            jobs.append((source, target, work.final, version))
    _run(work, shards.encode_shard, jobs, "tokenising and embedding")


def _group(work: _Work) -> None:
    jobs = []
    centroids = work.path / "centroids.safetensors"
    for source, encoded, target in zip(*map(work.shards, ("documents", "encoded", "grouped"))):
        if not target.exists():
            jobs.append((source, encoded, target, centroids, len(work.splits)))
    _run(work, shards.group_shard, jobs, "grouping by domain")


# Stages 7 and 8


def _write_windows(work: _Work) -> windows.Layout:
    grouped = work.shards("grouped")
    starts = sum(shards.load(path, "starts")["starts"] for path in grouped)
    num_tokens = np.diff(starts).reshape(len(work.splits), -1)
    tokenizer = tokenizer_lib.load_tokenizer(work.final / "tokenizer.json")
    layout = windows.Layout.of(
        dict(zip(work.splits, num_tokens)),
        seq_len=work.cfg.seq_len,
        vocab_size=tokenizer.vocab_size,
        eos_id=tokenizer.eos_id,
    )
    directory = work.final / "windows"
    directory.mkdir(parents=True, exist_ok=True)
    missing = [file for file in layout.files() if not (directory / file.name).exists()]
    jobs = [(directory, file, layout, grouped) for file in missing]
    _run(work, windows.write_window_file, jobs, "writing windows")
    windows.write_metadata(directory, layout)
    tensors = {f"offsets/{split}": value for split, value in layout.offsets.items()}
    tensors |= {f"pad/{split}": value for split, value in layout.pad.items()}
    shards.save(work.final / "offsets.safetensors", tensors)
    return layout


def _describe_domains(work: _Work, layout: windows.Layout) -> None:
    if (work.final / "domains.json").exists():
        return
    cfg, similarity, documents = work.cfg, [], 0
    for source, path in zip(work.shards("documents"), work.shards("grouped")):
        grouped = shards.load(path, "documents", "similarity")
        documents = documents + grouped["documents"].reshape(len(work.splits), -1)
        similarity.append(grouped["similarity"][shards.load(source, "split")["split"] == 0])
    quantiles = np.quantile(np.concatenate(similarity), domains.QUANTILES).astype(np.float32)
    centroids = shards.load(work.path / "centroids.safetensors")["centroids"]
    tensors = {"centroids": centroids, "similarity_quantiles": quantiles}
    shards.save(work.final / "centroids.safetensors", tensors)
    rows = shards.choose(work.shards("documents"), num_documents=cfg.embed.fit_documents)
    texts = list(shards.chosen_texts(work.shards("documents"), rows, domains.LABEL_CHARS))
    nearest = shards.chosen_rows(work.shards("grouped"), rows, "nearest")
    described = []
    for k, terms in enumerate(domains.top_terms(texts, nearest, cfg.num_domains)):
        entry = {"domain": k, "label": " ".join(terms[:3]) or f"domain {k}", "terms": terms}
        entry |= {name: {} for name in ("documents", "windows", "tokens")}
        for i, split in enumerate(work.splits):
            num_windows = int(np.diff(layout.offsets[split])[k])
            entry["documents"][split] = int(documents[i, k])
            entry["windows"][split] = num_windows
            entry["tokens"][split] = num_windows * layout.seq_len - int(layout.pad[split][k])
        described.append(entry)
    empty = [entry["domain"] for entry in described if not entry["windows"]["train"]]
    if empty:
        raise UserError(f"domains {empty} have no train documents: lower --config.num_domains")
    files.write_json(work.final / "domains.json", described)


def _manifest(
    work: _Work, layout: windows.Layout, totals: dict[str, int], report: corpus_lib.Report
) -> None:
    final = work.final
    files.write_json(final / "report.json", report.to_json())
    artefacts = {}
    for path in sorted(path for path in final.rglob("*") if path.is_file()):
        name = path.relative_to(final).as_posix()
        artefacts[name] = {"bytes": path.stat().st_size, "sha256": files.sha256_file(path)}
    described = files.read_json(final / "domains.json")
    splits = {
        split: {
            name: sum(entry[name][split] for entry in described)
            for name in ("documents", "windows", "tokens")
        }
        for split in work.splits
    }
    for source in work.shards("documents"):
        shard = shards.load(source, "offsets", "split")
        size = np.bincount(shard["split"], np.diff(shard["offsets"]), len(work.splits))
        for split, num_bytes in zip(work.splits, size):
            splits[split]["bytes"] = splits[split].get("bytes", 0) + int(num_bytes)
    # What the windows and the domains are, not where the text lay or what was wrong with it.
    content = {name: a["sha256"] for name, a in artefacts.items() if name != "report.json"}
    tokenizer = tokenizer_lib.load_tokenizer(final / "tokenizer.json")
    manifest = {
        "format": windows.FORMAT_VERSION,
        "fingerprint": files.sha256_bytes(files.json_text(content).encode()),
        "seq_len": layout.seq_len,
        "vocab_size": tokenizer.vocab_size,
        "eos_id": layout.eos_id,
        "tokenizer": tokenizer.hash,
        "embedder": load_embedder(final).name,
        "counts": totals | {"damaged": sum(report.counts.values()), "splits": splits},
        "window_files": {
            split: [
                {"name": file.name, "windows": file.stop - file.start}
                for file in layout.files()
                if file.split == split
            ]
            for split in work.splits
        },
        "artefacts": artefacts,
        "request": work.request,
    }
    files.write_json(final / "manifest.json", manifest)


def _publish(work: _Work) -> None:
    """Move the artefacts to their place, the manifest last; remove the rest."""
    for path in sorted(work.final.iterdir(), key=lambda path: path.name == "manifest.json"):
        target = work.directory / path.name
        if target.is_dir():  # of a run with other settings that was killed while it moved things
            shutil.rmtree(target)
        os.replace(path, target)
    shutil.rmtree(work.path)


# Small tools


def _run(work: _Work, function: Callable[..., None], jobs: Sequence[tuple], name: str) -> None:
    if jobs:
        done = parallel.parallel_map(function, jobs, num_workers=work.num_workers)
        for _ in _progress(done, name, total=len(jobs)):
            pass


def _progress(items: Iterable[Any], name: str, total: int | None = None) -> Iterator[Any]:
    """Pass `items` on under a progress bar; one line on stderr when that is not a terminal."""
    if not sys.stderr.isatty():
        _say(name)
    yield from tqdm.tqdm(
        items, desc=name, total=total, mininterval=0.5, disable=not sys.stderr.isatty()
    )


def _say(text: str) -> None:
    print(f"prepare: {text}", file=sys.stderr, flush=True)
