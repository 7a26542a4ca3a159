"""What `prepare` leaves out after it has read: duplicates, and documents of an evaluation.

    documents/   -> signed/       of whole documents: signatures, and the evaluation's  `sign_shard`
                 -> kept, dropped.json   over all shards                                    `clean`
                 -> clean/        the documents that are kept                         `keep_shard`

**Duplicates** of the same text: the first in the order of the sources stays.

**Near duplicates**: two documents whose sets of word 5-grams have an estimated Jaccard similarity
of at least `corpus.near_duplicates`. Candidates share one of 14 bands of their MinHash signatures
(`ngrams`); what is similar to what is similar counts as similar, and of such a group the first
document in the order of the sources stays. They are looked for if the config asks for it.

**Contamination**: a document that has too much of one of `corpus.evaluation` (contamination.py).

All three look at whole documents, also where `corpus.max_chars` cuts them into pieces: in a copy
with another beginning cuts fall elsewhere.

Choosing what is kept is for one process. Its memory is about 70 bytes per document, and beside that
100 per document in passes of _HASHES for duplicates and 1 kB per pair of similar ones in blocks of
_PAIRS; each of these blocks reads the signatures of most shards. A worker holds a shard or two, and
the index of the evaluation.
"""

import os
import pathlib
import shutil
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import safetensors
import scipy.sparse
import scipy.sparse.csgraph

from soup_jax import storage as files
from soup_jax.data.prepare import contamination, ngrams, shards
from soup_jax.data.prepare.work import Job, Work, alone, progress, run_jobs
from soup_jax.data.readers import short_hashes, text_hash

DROPPED = "dropped.json"
NEAR_WORDS = 5
_PAIRS = 1 << 19
_HASHES = 1 << 24
_EXAMPLES = 1000
_EXAMPLE_CHARS = 300


def sign(work: Work) -> None:
    """Write what is missing of signed/, for the shards that are there."""
    cfg, evaluation = work.cfg.corpus, work.path / "evaluation.safetensors"
    if work.kept.exists() or not (cfg.near_duplicates or cfg.evaluation):
        return
    if cfg.evaluation and not evaluation.exists():
        contamination.write_index(evaluation, cfg)
    scored, near = evaluation if cfg.evaluation else None, cfg.near_duplicates > 0
    jobs = [  # whoever has read a group signs its shards
        Job((a, b, scored, near), (b,), number=int(a.name.partition("-")[0]))
        for a, b in zip(work.shards("documents"), work.shards("signed"))
    ]
    name = "looking for near duplicates and contamination"
    run_jobs(work, sign_shard, jobs, name, wait=work.part.merges)


def clean(work: Work) -> dict[str, int]:
    """Write the clean shards that are missing, and dropped.json; returns what was counted."""
    if not work.kept.exists():
        alone(work, "choosing the documents that are kept")
        _choose(work)
    shutil.rmtree(work.path / "signed", ignore_errors=True)
    both = zip(work.shards("documents"), work.shards("clean"))
    jobs = [Job((a, b, work.kept, i), (b,)) for i, (a, b) in enumerate(both)]
    run_jobs(work, keep_shard, jobs, "keeping what is clean")
    return shards.state_of(work.kept)["counts"]


def sign_shard(
    source: pathlib.Path, target: pathlib.Path, evaluation: pathlib.Path | None, near: bool
) -> None:
    """Documents -> of each whole one, signature uint32 [n, 112] and bands uint64 [14, n]; owner
    int64 [n], the number of the evaluation document that it has most in common with or -1, and
    share float32 [n]."""
    shard = shards.whole_documents(shards.load(source))
    texts = list(shards.texts_of(shard, range(len(shard["hash"]))))
    tensors: dict[str, np.ndarray] = {}
    if near:
        signature = ngrams.signatures(texts, NEAR_WORDS)
        bands = ngrams.bands(signature)
        wordless = (signature == np.uint32(0xFFFFFFFF)).all(axis=1)
        bands[wordless] = short_hashes(shard["hash"])[wordless, None]  # are like nothing else
        tensors |= {"signature": signature, "bands": np.ascontiguousarray(bands.T)}
    if evaluation is not None:
        tensors |= contamination.owners(texts, shard["hash"], evaluation)
    shards.save(target, tensors)


def keep_shard(source: pathlib.Path, target: pathlib.Path, kept: pathlib.Path, number: int) -> None:
    """Move shard `number`, or what of it is kept."""
    mask = shards.load(kept, f"{number}")[f"{number}"]
    target.parent.mkdir(parents=True, exist_ok=True)
    if mask.all():
        os.replace(source, target)
        return
    shard, rows = shards.load(source), np.flatnonzero(mask)
    texts = [shard["text"][shard["offsets"][i] : shard["offsets"][i + 1]] for i in rows]
    ends = np.cumsum([len(text) for text in texts], dtype=np.int64)
    tensors = {
        "text": np.concatenate([shard["text"][:0], *texts]),
        "offsets": np.concatenate([[0], ends]).astype(np.int64),
    }
    by_row = ("hash", "split", "piece", "domain")
    tensors |= {name: shard[name][rows] for name in by_row if name in shard}
    shards.save(target, tensors)
    source.unlink(missing_ok=True)


def duplicates(paths: Sequence[pathlib.Path]) -> tuple[np.ndarray, np.ndarray]:
    """(repeated bool [n], piece uint32 [n]) over all shards: whether a document, or a piece of a
    long one, stands somewhere before; and which piece of its document it is."""
    piece = np.concatenate([shards.load(path, "piece")["piece"] for path in paths])
    repeated = np.zeros(len(piece), bool)
    num_passes = -(-len(piece) // _HASHES)
    for number in range(num_passes):
        parts, start = [], 0
        for path in paths:
            halves = shards.load(path, "hash")["hash"].view(">u8")
            own = np.flatnonzero(halves[:, 0] % num_passes == number)
            parts.append((*halves[own].T.astype(np.uint64), start + own))
            start += len(halves)
        first, second, rows = (np.concatenate(part) for part in zip(*parts))
        order = np.lexsort((rows, piece[rows], second, first))
        keys = (first[order], second[order], piece[rows[order]])
        same = np.logical_and.reduce([key[1:] == key[:-1] for key in keys])
        repeated[rows[order[1:]][same]] = True
    return repeated, piece


def _choose(work: Work) -> None:
    cfg, sources, signed = work.cfg.corpus, work.shards("documents"), work.shards("signed")
    num_rows = [len(shards.load(path, "split")["split"]) for path in sources]
    repeated, piece = duplicates(sources)
    counts = {
        "duplicates": int((repeated & (piece == 0)).sum()),
        "cut": int((~repeated & (piece == 1)).sum()),
    }
    whole = piece == 0  # from here on, and in `signed`, it is by whole documents
    sizes = [int(part.sum()) for part in np.split(whole, np.cumsum(num_rows)[:-1])]
    kept = ~repeated[whole]
    described: dict[str, Any] = {}
    if cfg.evaluation:
        owner, share = (
            np.concatenate([shards.load(path, name)[name] for path in signed])
            for name in ("owner", "share")
        )
        found = np.flatnonzero(kept & (owner >= 0))
        places = shards.state_of(work.path / "evaluation.safetensors")
        described["contaminated"] = {
            "found": len(found),
            "dropped": cfg.contaminated == "drop",
            "examples": [
                {
                    "hash": text_hash(text).hex(),
                    "text": text[:_EXAMPLE_CHARS],
                    "evaluation": "{}:{}".format(*places[owner[row]]),
                    "share": round(float(share[row]), 4),
                }
                for row, text in zip(_some(found), _texts(sources, sizes, _some(found)))
            ],
        }
        kept[found] = cfg.contaminated != "drop"
    if cfg.near_duplicates > 0:
        first = near_duplicates(signed, kept, cfg.near_duplicates)
        dropped = np.flatnonzero(kept & (first != np.arange(len(kept))))
        some = _some(dropped)
        of_both = (_texts(sources, sizes, rows) for rows in (some, first[some]))
        close = ngrams.similarity(_rows(signed, sizes, some), _rows(signed, sizes, first[some]))
        described["near_duplicates"] = {
            "similarity": cfg.near_duplicates,
            "found": len(dropped),
            "dropped": True,
            "examples": [
                {
                    "hash": text_hash(text).hex(),
                    "kept_hash": text_hash(other).hex(),
                    "text": text[:_EXAMPLE_CHARS],
                    "kept": other[:_EXAMPLE_CHARS],
                    "similarity": round(float(x), 4),
                }
                for text, other, x in zip(*of_both, close)
            ],
        }
        kept[dropped] = False
    if described:
        files.write_json(work.final / DROPPED, described)
    counts |= {name: value["found"] for name, value in described.items()}
    rows = kept[np.cumsum(whole) - 1] & ~repeated
    tensors = {f"{i}": part for i, part in enumerate(np.split(rows, np.cumsum(num_rows)[:-1]))}
    state = {"counts": counts, "names": [path.name for path in sources]}
    shards.save(work.kept, tensors, state)


def near_duplicates(
    signed: Sequence[pathlib.Path], among: np.ndarray, threshold: float
) -> np.ndarray:
    """int64 [n]: the first document of each one's group, over all shards; its own number if it has
    no near duplicate, or is not `among` those that are looked at (bool [n])."""
    rows, pairs = np.flatnonzero(among), np.zeros(0, np.int64)
    sizes = []
    for path in signed:
        with safetensors.safe_open(path, "numpy") as shard:
            sizes.append(shard.get_slice("bands").get_shape()[1])
    num = len(among)
    for band in progress(range(ngrams.BANDS), "comparing", total=ngrams.BANDS):
        parts = []
        for path in signed:
            with safetensors.safe_open(path, "numpy") as shard:
                parts.append(shard.get_slice("bands")[band])
        keys = np.concatenate(parts)[rows]
        order = np.argsort(keys, kind="stable")
        same = keys[order][1:] == keys[order][:-1]
        begins = np.flatnonzero(np.concatenate([[True], ~same]))
        first = begins[np.cumsum(np.concatenate([[0], ~same])).astype(np.int64)]
        later = np.flatnonzero(same) + 1
        # With the first that has this band, and with the one before: groups that only the band
        # has brought together are found all the same.
        found = [rows[order[o]] * num + rows[order[later]] for o in (first[later], later - 1)]
        pairs = np.unique(np.concatenate([pairs, *found]))
    near = np.concatenate(
        [
            part[_similar(signed, sizes, part // num, part % num) >= threshold]
            for part in np.split(pairs, range(_PAIRS, len(pairs), _PAIRS))
        ]
    )
    nodes, numbers = np.unique(np.stack([near // num, near % num]), return_inverse=True)
    left, right = numbers.reshape(2, -1)
    graph = scipy.sparse.coo_matrix((np.ones(len(near)), (left, right)), [len(nodes)] * 2)
    _, group = scipy.sparse.csgraph.connected_components(graph, directed=False)
    first = np.arange(num)
    if len(nodes):
        first[nodes] = nodes[np.unique(group, return_index=True)[1]][group]
    return first


def _similar(
    signed: Sequence[pathlib.Path], sizes: Sequence[int], left: np.ndarray, right: np.ndarray
) -> np.ndarray:
    return ngrams.similarity(_rows(signed, sizes, left), _rows(signed, sizes, right))


def _rows(paths: Sequence[pathlib.Path], sizes: Sequence[int], rows: np.ndarray) -> np.ndarray:
    # Signatures by their numbers over all shards.
    found = np.zeros((len(rows), ngrams.NUM_HASHES), np.uint32)
    for path, places, inside in _by_shard(paths, sizes, rows):
        found[places] = shards.load(path, "signature")["signature"][inside]
    return found


def _texts(paths: Sequence[pathlib.Path], sizes: Sequence[int], rows: np.ndarray) -> list[str]:
    found = [""] * len(rows)
    for path, places, inside in _by_shard(paths, sizes, rows):
        documents = shards.whole_documents(shards.load(path))
        for place, text in zip(places, shards.texts_of(documents, inside)):
            found[place] = text
    return found


def _by_shard(
    paths: Sequence[pathlib.Path], sizes: Sequence[int], rows: np.ndarray
) -> Iterable[tuple[pathlib.Path, np.ndarray, np.ndarray]]:
    ends = np.cumsum(sizes)
    shard = np.searchsorted(ends, rows, side="right")
    for number in np.unique(shard):
        places = np.flatnonzero(shard == number)
        yield paths[number], places, rows[places] - (ends[number] - sizes[number])


def _some(rows: np.ndarray) -> np.ndarray:
    # Evenly spread.
    some = min(len(rows), _EXAMPLES)
    return rows[np.arange(some) * len(rows) // max(some, 1)]
