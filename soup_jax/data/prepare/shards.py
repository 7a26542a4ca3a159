"""Shards of documents: the pieces that `prepare` works on, one safetensors file each.

    documents/  text, offsets, hash, split; counts and damage       `write_documents`
    encoded/    token ids with EOS, ends, unit vectors              `encode_shard`
    grouped/    token ids sorted by split and domain (data/corpus)  `group_shard`

This module also chooses, by hash, the documents that tokenizer, embedder and k-means are fitted on.
soup_jax/data/prepare/stages.py says when and where all this runs, and what a kill does.
"""

import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from soup_jax.data.readers import short_hashes

SHARD_DOCUMENTS = 4096
SHARD_BYTES = 32 << 20


class _ShardBuilder:
    """Documents (whole ones or pieces) of the shard that is being filled."""

    def __init__(self) -> None:
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

    def write(self, path: pathlib.Path, report: Report, end: Sequence[int], last: bool) -> None:
        """`end` is where reading continues; `last` says that there is nothing to continue."""
        sizes = [len(text) for text in self.texts]
        tensors: dict[str, np.ndarray] = {
            "text": np.frombuffer(b"".join(self.texts), np.uint8),
            "offsets": np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64),
            "hash": np.frombuffer(b"".join(self.hashes), np.uint8).reshape(-1, 16),
            "split": np.array(self.splits, np.uint8),
        }
        state = {"counts": self.counts, "report": report.take().to_json()}
        save(path, tensors, state | {"end": list(end), "last": last})


def write_documents(
    directory: pathlib.Path,
    cfg: Any,
    sources: Sequence[corpus_lib.SourceFile],
    splits: Sequence[str],
    report: Report,
    progress: Callable[[Iterable[Any]], Iterable[Any]],
) -> dict[str, int]:
    """Write the document shards that are missing; returns the totals, fills `report`.

    `cfg` is the config's `corpus` section; `progress` passes documents on and shows how many.
    """
    seen: set[bytes] = set()
    end, last, number = [0, 0], False, 0
    totals: dict[str, int] = {}

    def account(path: pathlib.Path) -> dict[str, Any]:
        state = state_of(path)
        report.merge(Report(state["report"]))
        for name, count in state["counts"].items():
            totals[name] = totals.get(name, 0) + count
        return state

    path = directory / f"{number:06d}.safetensors"
    while path.exists():
        seen.update(row.tobytes() for row in load(path, "hash")["hash"])
        state = account(path)
        end, last, number = state["end"], state["last"], number + 1
        path = path.with_name(f"{number:06d}.safetensors")
    if last:
        return totals
    index = {source.path: i for i, source in enumerate(sources)}
    found, shard = Report(), _ShardBuilder()
    documents = corpus_lib.read_documents(sources, cfg.text_field, found, start=(end[0], end[1]))
    for document in progress(documents):
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
            pieces = corpus_lib.cut(document.text, cfg.max_chars)
            shard.counts["cut"] += len(pieces) > 1
            for piece in pieces:
                shard.add(piece, document.hash, splits.index(split))
        if shard.full():
            shard.write(path, found, (index[document.source], document.line), last=False)
            account(path)
            number, shard = number + 1, _ShardBuilder()
            path = path.with_name(f"{number:06d}.safetensors")
    shard.write(path, found, (len(sources), 0), last=True)
    account(path)
    return totals


Rows = list[np.ndarray]  # for every document shard, the chosen documents in it, ascending


def choose(
    documents: Sequence[pathlib.Path], *, num_bytes: int = 0, num_documents: int = 0
) -> Rows:
    """Train documents chosen by hash: about `num_bytes` of text, or `num_documents`.

    The half of the hash that chooses is not the half that splits.
    """
    train, rank, size = [], [], []
    for path in documents:
        shard = load(path, "split", "hash", "offsets")
        train.append(np.flatnonzero(shard["split"] == 0))
        rank.append(short_hashes(shard["hash"][train[-1]]))
        size.append(np.diff(shard["offsets"])[train[-1]])
    order = np.argsort(np.concatenate(rank), kind="stable")
    if num_bytes:
        sizes = np.concatenate(size)[order]
        num_documents = int(np.count_nonzero(np.cumsum(sizes) - sizes < num_bytes))
    chosen = np.zeros(len(order), bool)
    chosen[order[:num_documents]] = True
    ends = np.cumsum([len(rows) for rows in train])[:-1]
    return [rows[mask] for rows, mask in zip(train, np.split(chosen, ends))]


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
    """Tokens of a shard -> tokens sorted by (split, domain), document order kept."""
    tree = domains.Tree.of(load(centroids_path))
    shard, data = load(source, "split"), load(encoded)
    nearest, similarity = tree.assign(data["embeddings"])
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
        },
    )
    encoded.unlink()


def texts_of(shard: dict[str, np.ndarray], rows: Iterable[int]) -> Iterator[str]:
    """The texts in these rows of a document shard."""
    data, offsets = shard["text"], shard["offsets"]
    for row in rows:
        yield data[offsets[row] : offsets[row + 1]].tobytes().decode("utf-8")


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
