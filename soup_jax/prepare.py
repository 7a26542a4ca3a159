"""Prepare a corpus: source files to token windows grouped by domain, in one restartable command.

1. sources    -> document shards   read, check, deduplicate, split (soup_jax/corpus.py); in order
2. shards     -> tokenizer.json    BPE on train documents chosen by hash, or a given file
3. shards     -> embedder          fitted on train documents chosen by hash
4. shard      -> token ids + unit vectors per document; shards in parallel
5. vectors    -> centroids         k-means on the documents of 3
6. shard      -> token ids sorted by split and domain, document order kept; shards in parallel
7. all shards -> windows/          ArrayRecord files; files in parallel (soup_jax/windows.py)
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
import functools
import json
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import joblib
import numpy as np
import safetensors
import safetensors.numpy
import tqdm

from soup_jax import corpus as corpus_lib
from soup_jax import domains, files, windows
from soup_jax import embed as embed_lib
from soup_jax import tokenizer as tokenizer_lib
from soup_jax.errors import UserError

SHARD_DOCUMENTS = 4096
SHARD_BYTES = 32 << 20


def prepare(cfg: Any) -> windows.Corpus:
    """Prepare `cfg.corpus.dir` from `cfg.corpus.sources`; the finished folder is left alone.

    Raises:
      UserError: sources or settings that cannot work, or a folder made with other settings.
    """
    start = time.monotonic()
    _check(cfg)
    directory = pathlib.Path(cfg.corpus.dir)
    report = corpus_lib.Report()
    sources = corpus_lib.find_files(cfg.corpus.sources, report)
    request = make_request(cfg, sources)
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
            _check_documents(work)
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
    _summary(corpus, time.monotonic() - start)
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


def make_request(cfg: Any, sources: Sequence[corpus_lib.SourceFile]) -> dict[str, Any]:
    """What determines a corpus: every parameter that matters and the hash of every source."""
    tokenizer = {"train_bytes": cfg.tokenizer.train_bytes}
    if cfg.tokenizer.path:
        tokenizer = {"hash": tokenizer_lib.load_tokenizer(cfg.tokenizer.path).hash}
    names = ("text_field", "validation_fraction", "held_out_fraction", "min_chars", "max_chars")
    parameters = {name: getattr(cfg, name) for name in ("num_domains", "vocab_size", "seq_len")}
    parameters |= {f"corpus.{name}": getattr(cfg.corpus, name) for name in names}
    parameters |= {f"tokenizer.{name}": value for name, value in tokenizer.items()}
    parameters |= {f"embed.{name}": value for name, value in cfg.embed.items()}
    hashed = []
    for source in _progress(sources, "hashing the sources"):
        try:
            digest = files.sha256_file(source.path)
        except OSError:
            digest = None  # reading will report it
        hashed.append({"path": source.path, "sha256": digest})
    return {"format": windows.FORMAT_VERSION, "parameters": parameters, "sources": hashed}


def _differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    result = []
    if old["format"] != new["format"]:
        result.append(f"format: {old['format']}, now {new['format']}")
    for name in sorted(old["parameters"] | new["parameters"]):
        before, now = old["parameters"].get(name), new["parameters"].get(name)
        if before != now:
            result.append(f"{name}: {before}, now {now}")
    before = {source["path"]: source["sha256"] for source in old["sources"]}
    now = {source["path"]: source["sha256"] for source in new["sources"]}
    # The same contents in the same order are the same corpus, wherever they lie.
    if list(before.values()) != list(now.values()):
        gone, added = sorted(before.keys() - now.keys()), sorted(now.keys() - before.keys())
        changed = [path for path in before if path in now and before[path] != now[path]]
        for what, paths in (("removed", gone), ("added", added), ("changed", changed)):
            if paths:
                more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
                result.append(f"sources {what}: {', '.join(paths[:3])}{more}")
        if not (gone or added or changed):
            result.append("sources: in another order")
    return result


def _check(cfg: Any) -> None:
    if cfg.tokenizer.path:
        size = tokenizer_lib.load_tokenizer(cfg.tokenizer.path).vocab_size
        if size > cfg.vocab_size:
            raise UserError(
                f"the tokenizer {cfg.tokenizer.path} has {size} tokens, more than vocab_size = "
                f"{cfg.vocab_size}: set --config.vocab_size={size} or more"
            )
    elif cfg.vocab_size < tokenizer_lib.MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {cfg.vocab_size}; the byte-level tokenizer that is trained needs at "
            f"least {tokenizer_lib.MIN_VOCAB_SIZE}"
        )
    if cfg.num_domains > cfg.embed.fit_documents:
        raise UserError(
            f"num_domains is {cfg.num_domains}, but k-means sees only embed.fit_documents = "
            f"{cfg.embed.fit_documents} documents: raise --config.embed.fit_documents, best to "
            "some 50 per domain"
        )


def _finished(directory: pathlib.Path, request: dict[str, Any]) -> windows.Corpus:
    corpus = windows.open_corpus(directory)
    differences = _differences(corpus.manifest["request"], request)
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
        differences = _differences(files.read_json(record), request)
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


class _ShardBuilder:
    """Documents (whole ones or pieces) of the shard that is being filled."""

    def __init__(self):
        self.texts: list[bytes] = []
        self.hashes: list[bytes] = []
        self.splits: list[int] = []
        self.size = 0
        self.counts = dict.fromkeys(("documents", "duplicates", "too_short", "cut"), 0)

    def add(self, text: str, digest: bytes, split: int) -> None:
        self.texts.append(text.encode("utf-8"))
        self.hashes.append(digest)
        self.splits.append(split)
        self.size += len(self.texts[-1])

    def full(self) -> bool:
        return len(self.texts) >= SHARD_DOCUMENTS or self.size >= SHARD_BYTES

    def write(
        self, path: pathlib.Path, report: corpus_lib.Report, end: Sequence[int], last: bool
    ) -> None:
        """`end` is where reading continues; `last` says that there is nothing to continue."""
        sizes = [len(text) for text in self.texts]
        tensors = {
            "text": np.frombuffer(b"".join(self.texts), np.uint8),
            "offsets": np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
            "hash": np.frombuffer(b"".join(self.hashes), np.uint8).reshape(-1, 16),
            "split": np.array(self.splits, np.uint8),
        }
        state = {"counts": self.counts, "report": report.take().to_json()}
        state |= {"end": list(end), "last": last}
        _save(path, tensors, state)


def _read(work: _Work, report: corpus_lib.Report) -> dict[str, int]:
    """Write the document shards that are missing; returns the totals, fills `report`."""
    cfg = work.cfg.corpus
    seen: set[bytes] = set()
    end, last, number, totals = [0, 0], False, 0, {}

    def account(path: pathlib.Path) -> dict[str, Any]:
        state = _state(path)
        report.merge(corpus_lib.Report(state["report"]))
        for name, count in state["counts"].items():
            totals[name] = totals.get(name, 0) + count
        return state

    path = work.path / "documents" / f"{number:06d}.safetensors"
    while path.exists():
        seen.update(row.tobytes() for row in _load(path, "hash")["hash"])
        state = account(path)
        end, last, number = state["end"], state["last"], number + 1
        path = path.with_name(f"{number:06d}.safetensors")
    if last:
        return totals
    index = {source.path: i for i, source in enumerate(work.sources)}
    found, shard = corpus_lib.Report(), _ShardBuilder()
    documents = corpus_lib.read_documents(work.sources, cfg.text_field, found, start=tuple(end))
    for document in _progress(documents, "reading documents"):
        shard.counts["documents"] += 1
        if len(document.text) < cfg.min_chars:
            shard.counts["too_short"] += 1
        elif document.hash in seen:
            shard.counts["duplicates"] += 1
        else:
            seen.add(document.hash)
            split = corpus_lib.split_of(
                document.hash, cfg.validation_fraction, cfg.held_out_fraction
            )
            pieces = range(0, len(document.text), cfg.max_chars)
            shard.counts["cut"] += len(pieces) > 1
            for start in pieces:
                piece = document.text[start : start + cfg.max_chars]
                shard.add(piece, document.hash, work.splits.index(split))
        if shard.full():
            shard.write(path, found, (index[document.source], document.line), last=False)
            account(path)
            number, shard = number + 1, _ShardBuilder()
            path = path.with_name(f"{number:06d}.safetensors")
    shard.write(path, found, (len(work.sources), 0), last=True)
    account(path)
    return totals


def _check_documents(work: _Work) -> None:
    num_documents = sum(
        np.count_nonzero(_load(path, "split")["split"] == 0) for path in work.shards("documents")
    )
    if num_documents < work.cfg.num_domains:
        raise UserError(
            f"the sources hold {num_documents} train documents, fewer than num_domains = "
            f"{work.cfg.num_domains}: add sources or lower --config.num_domains"
        )


# Stages 2, 3 and 5: what is fitted on a sample

Rows = list[np.ndarray]  # for every document shard, the chosen documents in it, ascending


def _choose(work: _Work, *, num_bytes: int = 0, num_documents: int = 0) -> Rows:
    """Train documents chosen by hash: about `num_bytes` of text, or `num_documents`.

    The half of the hash that chooses is not the half that splits.
    """
    train, rank, size = [], [], []
    for path in work.shards("documents"):
        shard = _load(path, "split", "hash", "offsets")
        train.append(np.flatnonzero(shard["split"] == 0))
        rank.append(shard["hash"][train[-1], 8:].copy().view(">u8").ravel())
        size.append(np.diff(shard["offsets"])[train[-1]])
    order = np.argsort(np.concatenate(rank), kind="stable")
    if num_bytes:
        sizes = np.concatenate(size)[order]
        num_documents = int(np.count_nonzero(np.cumsum(sizes) - sizes < num_bytes))
    chosen = np.zeros(len(order), bool)
    chosen[order[:num_documents]] = True
    ends = np.cumsum([len(rows) for rows in train])[:-1]
    return [rows[mask] for rows, mask in zip(train, np.split(chosen, ends))]


def _chosen_texts(work: _Work, rows: Rows, max_chars: int | None = None) -> Iterator[str]:
    for path, chosen in zip(work.shards("documents"), rows):
        for text in _texts(_load(path), chosen):
            yield text[:max_chars]


def _chosen_rows(work: _Work, rows: Rows, kind: str, name: str) -> np.ndarray:
    paths = work.shards(kind)
    return np.concatenate([_load(path, name)[name][chosen] for path, chosen in zip(paths, rows)])


def _fit_tokenizer(work: _Work) -> None:
    path = work.final / "tokenizer.json"
    if path.exists():
        return
    cfg = work.cfg
    if cfg.tokenizer.path:
        tokenizer = tokenizer_lib.load_tokenizer(cfg.tokenizer.path)
        _say(f"took the tokenizer {cfg.tokenizer.path}: {tokenizer.vocab_size} tokens")
    else:
        rows = _choose(work, num_bytes=cfg.tokenizer.train_bytes)
        texts = _progress(_chosen_texts(work, rows), "training the tokenizer")
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
    rows = _choose(work, num_documents=cfg.fit_documents)
    texts = _progress(_chosen_texts(work, rows, cfg.max_chars), "fitting the embedder")
    embed_lib.fit_embedder(cfg, list(texts), num_workers=work.num_workers).save(work.final)


def _fit_centroids(work: _Work) -> None:
    path = work.path / "centroids.safetensors"
    if path.exists():
        return
    _say(f"cutting the corpus into {work.cfg.num_domains} domains")
    rows = _choose(work, num_documents=work.cfg.embed.fit_documents)
    embeddings = _chosen_rows(work, rows, "encoded", "embeddings")
    _save(path, {"centroids": domains.fit_centroids(embeddings, work.cfg.num_domains)})


# Stages 4 and 6: one shard each


def _encode(work: _Work) -> None:
    jobs = []
    version = files.sha256_file(work.final / "tokenizer.json")
    version += files.sha256_file(work.final / "embedder.json")
    for source, target, later in zip(*map(work.shards, ("documents", "encoded", "grouped"))):
        if not target.exists() and not later.exists():
            jobs.append((source, target, work.final, version))
    _run(work, encode_shard, jobs, "tokenising and embedding")


@functools.lru_cache(maxsize=1)
def _tools(
    directory: pathlib.Path, version: str
) -> tuple[tokenizer_lib.Tokenizer, embed_lib.Embedder]:
    # `version` keeps a worker that outlives a corpus from using the tools of another one.
    del version
    tokenizer = tokenizer_lib.load_tokenizer(directory / "tokenizer.json")
    return tokenizer, embed_lib.load_embedder(directory)


def encode_shard(
    source: pathlib.Path, target: pathlib.Path, directory: pathlib.Path, version: str
) -> None:
    """Documents -> tokens with EOS, their ends, and embeddings float32 [n, dim]."""
    tokenizer, embedder = _tools(directory, version)
    shard = _load(source)
    texts = list(_texts(shard, np.arange(len(shard["split"]))))
    dtype = windows.token_dtype(tokenizer.vocab_size)
    tokens = [np.array([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode_batch(texts)]
    _save(
        target,
        {
            "tokens": np.concatenate([np.zeros(0, dtype), *tokens]),
            "ends": np.cumsum([len(ids) for ids in tokens], dtype=np.int64),
            "embeddings": embedder.embed(texts),
        },
    )


def _group(work: _Work) -> None:
    jobs = []
    centroids = work.path / "centroids.safetensors"
    for source, encoded, target in zip(*map(work.shards, ("documents", "encoded", "grouped"))):
        if not target.exists():
            jobs.append((source, encoded, target, centroids, len(work.splits)))
    _run(work, group_shard, jobs, "grouping by domain")


def group_shard(
    source: pathlib.Path,
    encoded: pathlib.Path,
    target: pathlib.Path,
    centroids_path: pathlib.Path,
    num_splits: int,
) -> None:
    """Tokens of a shard -> tokens sorted by (split, domain), document order kept."""
    centroids = _load(centroids_path)["centroids"]
    shard, data = _load(source, "split"), _load(encoded)
    nearest, similarity = domains.assign(data["embeddings"], centroids)
    num_cells = num_splits * len(centroids)
    cell = shard["split"].astype(np.int64) * len(centroids) + nearest
    order = np.argsort(cell, kind="stable")
    begins = np.concatenate([[0], data["ends"]])[:-1]
    lengths = data["ends"] - begins
    size = np.bincount(cell, weights=lengths, minlength=num_cells).astype(np.int64)
    parts = [data["tokens"][begins[i] : data["ends"][i]] for i in order]
    _save(
        target,
        {
            "tokens": np.concatenate([data["tokens"][:0], *parts]),
            "starts": np.concatenate([[0], np.cumsum(size)]).astype(np.int64),
            "documents": np.bincount(cell, minlength=num_cells).astype(np.int64),
            "nearest": nearest,
            "similarity": similarity,
        },
    )
    encoded.unlink()


# Stages 7 and 8


def _write_windows(work: _Work) -> windows.Layout:
    grouped = work.shards("grouped")
    starts = sum(_load(path, "starts")["starts"] for path in grouped)
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
    jobs = [
        (directory, file, layout, grouped)
        for file in layout.files()
        if not (directory / file.name).exists()
    ]
    _run(work, windows.write_window_file, jobs, "writing windows")
    windows.write_metadata(directory, layout)
    tensors = {f"offsets/{split}": value for split, value in layout.offsets.items()}
    tensors |= {f"pad/{split}": value for split, value in layout.pad.items()}
    _save(work.final / "offsets.safetensors", tensors)
    return layout


def _describe_domains(work: _Work, layout: windows.Layout) -> None:
    if (work.final / "domains.json").exists():
        return
    cfg, similarity, documents = work.cfg, [], 0
    for source, path in zip(work.shards("documents"), work.shards("grouped")):
        grouped = _load(path, "documents", "similarity")
        documents = documents + grouped["documents"].reshape(len(work.splits), -1)
        similarity.append(grouped["similarity"][_load(source, "split")["split"] == 0])
    quantiles = np.quantile(np.concatenate(similarity), domains.QUANTILES).astype(np.float32)
    centroids = _load(work.path / "centroids.safetensors")["centroids"]
    tensors = {"centroids": centroids, "similarity_quantiles": quantiles}
    _save(work.final / "centroids.safetensors", tensors)
    rows = _choose(work, num_documents=cfg.embed.fit_documents)
    texts = list(_chosen_texts(work, rows, domains.LABEL_CHARS))
    nearest = _chosen_rows(work, rows, "grouped", "nearest")
    described = []
    for k, terms in enumerate(domains.top_terms(texts, nearest, cfg.num_domains)):
        entry = {"domain": k, "label": " ".join(terms[:3]) or f"domain {k}", "terms": terms}
        for name in ("documents", "windows", "tokens"):
            entry[name] = {}
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
        shard = _load(source, "offsets", "split")
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
        "embedder": embed_lib.load_embedder(final).name,
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


def _summary(corpus: windows.Corpus, seconds: float) -> None:
    counts = corpus.manifest["counts"]
    print(
        f"{corpus.path}: {counts['documents']:,} documents read, {counts['duplicates']:,} "
        f"duplicates and {counts['too_short']:,} too short ones dropped, {counts['cut']:,} long "
        f"ones cut; {corpus.num_domains} domains, {corpus.vocab_size:,} tokens in the vocabulary; "
        f"{seconds:.0f} s"
    )
    for split, count in counts["splits"].items():
        print(
            f"  {split}: {count['documents']:,} documents, {count['bytes'] / 1e6:,.1f} MB, "
            f"{count['tokens']:,} tokens, {count['windows']:,} windows of {corpus.seq_len}"
        )
    lines = corpus_lib.Report(files.read_json(corpus.path / "report.json")).lines()
    print(f"  damaged: {counts['damaged']}" + (" (all in report.json)" if lines else ""))
    for line in lines:
        print(f"    {line}")


# Small tools


def _run(work: _Work, function: Callable[..., None], jobs: Sequence[tuple], name: str) -> None:
    if jobs:
        done = embed_lib.parallel_map(function, jobs, num_workers=work.num_workers)
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


def _texts(shard: dict[str, np.ndarray], rows: Iterable[int]) -> Iterator[str]:
    data, offsets = shard["text"], shard["offsets"]
    for row in rows:
        yield data[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8")


def _save(path: pathlib.Path, tensors: dict[str, np.ndarray], state: Any = None) -> None:
    metadata = None if state is None else {"state": files.json_text(state)}
    with files.atomic_path(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata)


def _load(path: pathlib.Path, *names: str) -> dict[str, np.ndarray]:
    """The named tensors of a file; all of them when none is named."""
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def _state(path: pathlib.Path) -> dict[str, Any]:
    with safetensors.safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["state"])
