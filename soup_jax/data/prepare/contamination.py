"""Which documents of an evaluation stand in the text to train on, or the other way round.

A document of the sources is contaminated if it has 70% of the word 8-grams of a document of
`corpus.evaluation`, or if 70% of its own are in that one. With half, licences and notices that many
documents carry make short ones count. So is an exact copy, of a document without words, too.

The index takes 16 bytes per n-gram of the evaluation, and 8 more of those that do not lead to every
document that has them.
"""

import functools
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from soup_jax.data import sources as corpus_lib
from soup_jax.data.damage import Report
from soup_jax.data.prepare import ngrams, shards
from soup_jax.data.prepare.work import say
from soup_jax.data.readers import Document, short_hashes
from soup_jax.errors import UserError

OVERLAP_WORDS = 8
OVERLAP = 0.7
_TEXTS = 256  # at a time: each n-gram may have _OWNERS pairs
_OWNERS = 50  # evaluation documents that an n-gram leads to


def owners(texts: Sequence[str], hash_N16: np.ndarray, path: pathlib.Path) -> dict[str, np.ndarray]:
    """`owner` int64 [n], the number of the evaluation document that each text has most in common
    with or -1, and `share` float32 [n], by the index at `path`."""
    status = path.stat()
    known = _index_at(path, status.st_mtime_ns, status.st_size)
    parts = [overlaps(texts[i : i + _TEXTS], known) for i in range(0, max(len(texts), 1), _TEXTS)]
    owner, share = (np.concatenate(part) for part in zip(*parts))
    copies = _copies(short_hashes(hash_N16), known["digests"])
    return {
        "owner": np.where(copies >= 0, copies, owner),
        "share": np.where(copies >= 0, np.float32(1), share),
    }


def overlaps(
    texts: Sequence[str], evaluation: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """(owner int64 [n] or -1, share float32 [n]): of each text, the evaluation document with which
    it has at least OVERLAP of the n-grams of either in common, and how much.

    Args:
      evaluation: the tensors of `index`.
    """
    hashes, ends = ngrams.ngrams(texts, OVERLAP_WORDS)
    own = np.diff(ends, prepend=0)
    begins, stops = (
        np.searchsorted(evaluation["hashes"], hashes, side=side) for side in ("left", "right")
    )
    count = stops - begins
    text = np.repeat(np.repeat(np.arange(len(texts)), own), count)
    place = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    other = evaluation["owner"][np.repeat(begins, count) + place]
    num = len(evaluation["sizes"])
    pair, shared = np.unique(text * num + other, return_counts=True)
    text, other = pair // max(num, 1), pair % max(num, 1)
    least = np.minimum(own[text], evaluation["sizes"][other])
    common_ends = evaluation["common_ends"]
    hidden = np.diff(common_ends, prepend=0)[other]
    for i in np.flatnonzero((hidden > 0) & (shared + hidden >= OVERLAP * least)):
        stop = common_ends[other[i]]
        common = evaluation["common"][stop - hidden[i] : stop]
        of_text = hashes[ends[text[i]] - own[text[i]] : ends[text[i]]]
        shared[i] += np.isin(common, of_text, assume_unique=True).sum()
    found = shared / least
    owner, share = np.full(len(texts), -1), np.zeros(len(texts), np.float32)
    for i in np.argsort(found, kind="stable"):  # the largest comes last, and stays
        if found[i] >= OVERLAP:
            owner[text[i]], share[text[i]] = other[i], found[i]
    return owner, share


def index(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """What tells which of these documents others have n-grams of.

    An n-gram that more than _OWNERS of them share, as a form's do, leads to none of those that have
    enough others: to find them by it would take its square of pairs. It leads to the first _OWNERS
    of the documents that consist of such n-grams.

    Returns:
      `hashes` uint64, sorted, and `owner`, the document that each leads to; of each document,
      `sizes`, the number of its n-grams, and `common_ends`, the ends in `common`, sorted, of its
      n-grams that do not lead to it.
    """
    hashes, ends = ngrams.ngrams(texts, OVERLAP_WORDS)
    sizes = np.diff(ends, prepend=0)
    owner = np.repeat(np.arange(len(texts)), sizes)
    order = np.argsort(hashes, kind="stable")
    hashes, owner = hashes[order], owner[order]
    _, number, count = np.unique(hashes, return_inverse=True, return_counts=True)
    rare = count[number] <= _OWNERS
    few = np.bincount(owner[rare], minlength=len(texts)) < (1 - OVERLAP) * sizes
    # Of one n-gram those documents with few others, in their order.
    chosen = ~rare & few[owner]
    place: np.ndarray = np.cumsum(chosen) - chosen
    first = np.concatenate([[0], np.cumsum(count)])[:-1][number]
    leads = rare | (chosen & (place - place[first] < _OWNERS))
    hidden = np.lexsort((hashes[~leads], owner[~leads]))
    return {
        "hashes": hashes[leads],
        "owner": owner[leads],
        "sizes": sizes,
        "common": hashes[~leads][hidden],
        "common_ends": np.cumsum(np.bincount(owner[~leads], minlength=len(texts))),
    }


def _copies(hashes: np.ndarray, digests: np.ndarray) -> np.ndarray:
    # The first of `digests` that each of `hashes` is equal to, or -1.
    order = np.argsort(digests, kind="stable")
    place = np.searchsorted(digests[order], hashes)
    found = np.append(order, -1)[place]
    return np.where((found >= 0) & (digests[found] == hashes), found, -1)


def write_index(path: pathlib.Path, cfg: Any) -> None:
    """Read `corpus.evaluation` and write the tensors of `index`, and `digests`; its state is the
    place of each document.

    Raises:
      UserError: a file in which most records have no such text.
    """
    field = cfg.evaluation_text_field or cfg.text_field
    found = corpus_lib.find_files(cfg.evaluation, Report())
    documents: list[Document] = []
    for source in found:
        of_source = list(corpus_lib.read_documents([source], field, report := Report()))
        for line in report.lines():
            say(f"corpus.evaluation: {line}")
        if not of_source or report.counts.get("no_text", 0) > len(of_source):
            hint = report.text_field()
            flag = "--config.corpus.evaluation_text_field="
            raise UserError(
                f"corpus.evaluation: {source.path} has {len(of_source)} documents with a text in "
                f"{field!r}" + (f". If {hint!r} holds the text, give {flag}{hint}" if hint else "")
            )
        documents += of_source
    say(f"corpus.evaluation: {len(documents):,} documents in {len(found)} files")
    digests = np.frombuffer(b"".join(d.hash for d in documents), np.uint8).reshape(-1, 16)
    tensors = {"digests": short_hashes(digests)}
    tensors |= index([d.text for d in documents])
    shards.save(path, tensors, [[d.source, d.line] for d in documents])


@functools.lru_cache(maxsize=1)
def _index_at(path: pathlib.Path, *stamp: int) -> dict[str, np.ndarray]:
    # By its stamp, too: a process may outlive the corpus whose it is.
    del stamp
    return shards.load(path)
