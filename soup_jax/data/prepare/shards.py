"""Shards of documents: the pieces that `prepare` works on, one safetensors file each.

    documents/  text, offsets, hash, split, piece, perhaps domain;
                counts, damage                                      `read_group`
    clean/      the same without those that are left out            `clean.keep_shard`
    encoded/    token ids with EOS, ends, unit vectors              `encode_shard`
    grouped/    token ids sorted by split and domain (data/corpus)  `group_shard`
                windows/ of the corpus                              `write_window_file`

This module also chooses, by hash, the documents that tokenizer, embedder and k-means are fitted on.
soup_jax/data/prepare/stages.py says when and where all this runs, and what a kill does.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy

from soup_jax import storage as files
from soup_jax.data import domains, windows
from soup_jax.data import sources as corpus_lib
from soup_jax.data import tokenizer as tokenizer_lib
from soup_jax.data.damage import Report
from soup_jax.data.embed.base import Embedder, load_embedder
from soup_jax.data.prepare import provenance
from soup_jax.data.readers import Document, short_hashes

SHARD_DOCUMENTS = 4096
SHARD_BYTES = 32 << 20
GROUP_BYTES, GROUP_FILES = 16 << 20, 4096
_RANGES, _RANGE_SHIFT = 1 << 16, np.uint64(48)  # of hashes, for `choose`


@dataclasses.dataclass(frozen=True)
class Reading:
    """How files are read: fields of the config's `corpus` section, and the names of the splits."""

    text_field: str
    min_chars: int
    max_chars: int
    validation_fraction: float
    held_out_fraction: float
    splits: tuple[str, ...]
    domain_field: str = ""


class _ShardBuilder:
    """Documents (whole ones or pieces) of the shard that is being filled."""

    def __init__(self, *, named: bool) -> None:
        self._named = named  # whether documents name their domains
        self.texts: list[bytes] = []
        self.hashes: list[bytes] = []
        self.splits: list[int] = []
        self.pieces: list[int] = []
        self.domains: list[str] = []
        self.size = 0
        self.counts = dict.fromkeys(("documents", "too_short"), 0)

    def add(self, text: str, digest: bytes, split: int, piece: int, domain: str) -> None:
        self.texts.append(text.encode("utf-8"))
        self.hashes.append(digest)
        self.splits.append(split)
        self.pieces.append(piece)
        self.domains.append(domain)
        self.size += len(self.texts[-1])

    def full(self) -> bool:
        return len(self.texts) >= SHARD_DOCUMENTS or self.size >= SHARD_BYTES

    def write(self, path: pathlib.Path, report: Report, end: Sequence[int], last: bool) -> None:
        """`end` is where reading continues; `last` says that there is nothing to continue."""
        sizes = [len(text) for text in self.texts]
        tensors: dict[str, np.ndarray] = {
            "text": np.frombuffer(b"".join(self.texts), np.uint8),
            "offsets": np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
            "hash": np.frombuffer(b"".join(self.hashes), np.uint8).reshape(-1, 16),
            "split": np.array(self.splits, np.uint8),
            "piece": np.array(self.pieces, np.uint32),
        }
        state: dict[str, Any] = {"counts": self.counts, "report": report.take().to_json()}
        if self._named:
            tensors["domain"] = domain_keys(self.domains)
            state["domains"] = sorted(set(self.domains))
        save(path, tensors, state | {"end": list(end), "last": last})


def domain_keys(names: Iterable[str]) -> np.ndarray:
    """uint64 [n]: what stands for the names of given domains in shards."""
    digests = [hashlib.blake2b(name.encode("utf-8"), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), "<u8")


def hash_files(sources: Sequence[corpus_lib.SourceFile], target: pathlib.Path) -> None:
    """Write the SHA-256 of these files as a JSON list; null for one that cannot be read."""
    files.write_json(target, [provenance.hash_of(source.path) for source in sources])


def groups(sources: Sequence[corpus_lib.SourceFile]) -> list[Sequence[corpus_lib.SourceFile]]:
    """The sources in order, in runs of about GROUP_BYTES: what one job reads."""
    found: list[list[corpus_lib.SourceFile]] = [[]]
    size = 0
    for source in sources:
        if size >= GROUP_BYTES or len(found[-1]) >= GROUP_FILES:
            found.append([])
            size = 0
        found[-1].append(source)
        size += source.size
    return list(found)


def read_group(
    directory: pathlib.Path,
    number: int,
    sources: Sequence[corpus_lib.SourceFile],
    reading: Reading,
) -> None:
    """Files -> the shards of their documents that are missing, duplicates too, and last NUMBER.json
    with what was counted and what was damaged."""
    counts: dict[str, int] = {}
    report, names = Report(), set[str]()
    end, last, shards = [0, 0], False, 0

    def account(path: pathlib.Path) -> None:
        nonlocal end, last, shards
        state = state_of(path)
        report.merge(Report(state["report"]))
        for name, count in state["counts"].items():
            counts[name] = counts.get(name, 0) + count
        names.update(state.get("domains", ()))
        end, last, shards = state["end"], state["last"], shards + 1

    def path() -> pathlib.Path:
        return directory / f"{number:06d}-{shards:06d}.safetensors"

    while path().exists():
        account(path())
    if not last:
        index = {source.path: i for i, source in enumerate(sources)}
        named = bool(reading.domain_field)
        found, shard = Report(), _ShardBuilder(named=named)
        start = (end[0], end[1])
        for document in corpus_lib.read_documents(
            sources, reading.text_field, found, domain_field=reading.domain_field, start=start
        ):
            _add(shard, document, reading)
            if shard.full():
                place = (index[document.source], document.line)
                shard.write(path(), found, place, last=False)
                account(path())
                shard = _ShardBuilder(named=named)
        shard.write(path(), found, (len(sources), 0), last=True)
        account(path())
    state: dict[str, Any] = {"counts": counts, "report": report.to_json()}
    if reading.domain_field:
        state["domains"] = sorted(names)
    files.write_json(directory / f"{number:06d}.json", state)


def _add(shard: _ShardBuilder, document: Document, reading: Reading) -> None:
    shard.counts["documents"] += 1
    if len(document.text) < reading.min_chars:
        shard.counts["too_short"] += 1
        return
    split = corpus_lib.split_of(
        document.hash, reading.validation_fraction, reading.held_out_fraction
    )
    for piece, text in enumerate(corpus_lib.cut(document.text, reading.max_chars)):
        shard.add(text, document.hash, reading.splits.index(split), piece, document.domain)


Rows = list[np.ndarray]  # for every document shard, the chosen documents in it, ascending


def choose(
    documents: Sequence[pathlib.Path], *, num_bytes: int = 0, num_documents: int = 0
) -> Rows:
    """Train documents chosen by hash: about `num_bytes` of text, or `num_documents`.

    The half of the hash that chooses is not the half that splits. The least hashes are chosen; one
    pass finds in which of many ranges the last of them lies, and only that range is sorted.
    """
    most = num_bytes or num_documents

    def ranked(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        # The rows of train documents, their hashes, and what each counts.
        shard = load(path, "split", "hash", "offsets")
        rows = np.flatnonzero(shard["split"] == 0)
        size = np.diff(shard["offsets"])[rows] if num_bytes else np.ones(len(rows), np.int64)
        return rows, short_hashes(shard["hash"][rows]), size

    total = np.zeros(_RANGES, np.int64)
    for path in documents:
        _, rank, size = ranked(path)
        np.add.at(total, (rank >> _RANGE_SHIFT).astype(np.int64), size)
    before = np.cumsum(total) - total
    last = max(int(np.count_nonzero(before < most)) - 1, 0)
    found, inside, sizes = [], [], []
    for path in documents:
        rows, rank, size = ranked(path)
        number = (rank >> _RANGE_SHIFT).astype(np.int64)
        found.append((rows[number < last], rows[number == last]))
        inside.append(rank[number == last])
        sizes.append(size[number == last])
    order = np.argsort(np.concatenate(inside), kind="stable")
    ordered = np.concatenate(sizes)[order]
    chosen = np.zeros(len(order), bool)
    chosen[order] = before[last] + np.cumsum(ordered) - ordered < most
    parts = np.split(chosen, np.cumsum([len(part) for part in inside])[:-1])
    return [np.sort(np.append(sure, own[mask])) for (sure, own), mask in zip(found, parts)]


def chosen_texts(
    documents: Sequence[pathlib.Path], rows: Rows, max_chars: int | None = None
) -> Iterator[str]:
    """The chosen documents in corpus order, at most `max_chars` characters of each."""
    for path, chosen in zip(documents, rows):
        for text in texts_of(load(path), chosen):
            yield text[:max_chars]


def chosen_rows(paths: Sequence[pathlib.Path], rows: Rows, name: str) -> np.ndarray:
    """The rows of tensor `name` that belong to the chosen documents."""
    return np.concatenate([load(path, name)[name][chosen] for path, chosen in zip(paths, rows)])


@functools.lru_cache(maxsize=1)
def _tools(directory: pathlib.Path, version: str) -> tuple[tokenizer_lib.Tokenizer, Embedder]:
    # `version` keeps a worker that outlives a corpus from using the tools of another one.
    del version
    tokenizer = tokenizer_lib.load_tokenizer(directory / "tokenizer.json")
    return tokenizer, load_embedder(directory)


def encode_shard(
    source: pathlib.Path, target: pathlib.Path, directory: pathlib.Path, version: str
) -> None:
    """Documents -> tokens with EOS, their ends, and embeddings float32 [n, dim]."""
    tokenizer, embedder = _tools(directory, version)
    shard = load(source)
    texts = list(texts_of(shard, np.arange(len(shard["split"]))))
    tokens, ends = encode_tokens(tokenizer, texts)
    save(target, {"tokens": tokens, "ends": ends, "embeddings": embedder.embed(texts)})


def encode_tokens(
    tokenizer: tokenizer_lib.Tokenizer, texts: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """The token ids of all texts, EOS after each, and int64 [n] where each of them ends."""
    dtype = windows.token_dtype(tokenizer.vocab_size)
    tokens = [np.array([*ids, tokenizer.eos_id], dtype) for ids in tokenizer.encode_batch(texts)]
    ends = np.cumsum([len(ids) for ids in tokens], dtype=np.int64)
    return np.concatenate([np.zeros(0, dtype), *tokens]), ends


def group_shard(
    source: pathlib.Path,
    encoded: pathlib.Path,
    target: pathlib.Path,
    centroids_path: pathlib.Path,
    num_splits: int,
) -> None:
    """Tokens of a shard -> tokens sorted by (split, domain), document order kept.

    The domain is that of the nearest centroid, or the one that the document names; `agree` counts
    those for which they are the same.
    """
    tensors = load(centroids_path)
    tree, given_K = domains.Tree.of(tensors), tensors.get("given")
    shard, data = load(source, *["split", "domain"][: 1 if given_K is None else 2]), load(encoded)
    nearest, similarity = tree.assign(data["embeddings"])
    agree = len(nearest)
    if given_K is not None:
        order = np.argsort(given_K)
        named = order[np.searchsorted(given_K, shard["domain"], sorter=order)].astype(np.int32)
        nearest, agree = named, int((named == nearest).sum())
    num_cells = num_splits * tree.sizes[-1]
    cell = shard["split"].astype(np.int64) * tree.sizes[-1] + nearest
    order = np.argsort(cell, kind="stable")
    begins = np.concatenate([[0], data["ends"]])[:-1]
    lengths = data["ends"] - begins
    size = np.bincount(cell, weights=lengths, minlength=num_cells).astype(np.int64)
    parts = [data["tokens"][begins[i] : data["ends"][i]] for i in order]
    save(
        target,
        {
            "tokens": np.concatenate([data["tokens"][:0], *parts]),
            "starts": np.concatenate([[0], np.cumsum(size)]).astype(np.int64),
            "documents": np.bincount(cell, minlength=num_cells).astype(np.int64),
            "nearest": nearest,
            "similarity": similarity,
            "agree": np.array(agree, np.int64),
        },
    )
    encoded.unlink()


def save_layout(
    path: pathlib.Path, layout: windows.Layout, grouped: Sequence[pathlib.Path]
) -> None:
    """Write what `write_window_file` reads: the layout, and the shards that fill it."""
    state = {
        "splits": list(layout.offsets),
        "seq_len": layout.seq_len,
        "dtype": layout.dtype.str,
        "eos_id": layout.eos_id,
        "grouped": [str(place) for place in grouped],
    }
    save(path, layout.tensors(), state)


def write_window_file(
    directory: pathlib.Path, file: windows.WindowFile, plan: pathlib.Path
) -> None:
    """Write a file of the layout, by what `save_layout` wrote."""
    status = plan.stat()
    layout, grouped = _layout(plan, status.st_mtime_ns, status.st_size)
    windows.write_window_file(directory, file, layout, grouped)


@functools.lru_cache(maxsize=1)
def _layout(plan: pathlib.Path, *stamp: int) -> tuple[windows.Layout, list[pathlib.Path]]:
    del stamp
    tensors, state = load(plan), state_of(plan)
    layout = windows.Layout(
        seq_len=state["seq_len"],
        dtype=np.dtype(state["dtype"]),
        eos_id=state["eos_id"],
        offsets={split: tensors[f"offsets/{split}"] for split in state["splits"]},
        pad={split: tensors[f"pad/{split}"] for split in state["splits"]},
    )
    return layout, [pathlib.Path(place) for place in state["grouped"]]


def texts_of(shard: dict[str, np.ndarray], rows: Iterable[int]) -> Iterator[str]:
    """The texts in these rows of a document shard."""
    data, offsets = shard["text"], shard["offsets"]
    for row in rows:
        yield data[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8")


def whole_documents(shard: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """text, offsets and hash of a document shard, of whole documents instead of their pieces."""
    begins = np.flatnonzero(shard["piece"] == 0)
    return {
        "text": shard["text"],
        "offsets": np.append(shard["offsets"][begins], shard["offsets"][-1]),
        "hash": shard["hash"][begins],
    }


def save(path: pathlib.Path, tensors: dict[str, np.ndarray], state: Any = None) -> None:
    """Write tensors, and a JSON-ready `state` beside them, atomically."""
    metadata = None if state is None else {"state": files.json_text(state)}
    with files.atomic_path(path) as temporary:
        safetensors.numpy.save_file(tensors, temporary, metadata)


def load(path: pathlib.Path, *names: str) -> dict[str, np.ndarray]:
    """The named tensors of a file; all of them when none is named."""
    with safetensors.safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in names or file.keys()}


def state_of(path: pathlib.Path) -> dict[str, Any]:
    """The `state` that a file was saved with."""
    with safetensors.safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["state"])
