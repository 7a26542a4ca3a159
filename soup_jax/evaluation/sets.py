"""What is scored: held-out documents of specialists, and the generic validation split.

A specialist is a file of documents, or a folder. A hash splits them into three parts: one gives
the histogram h; training scores `tuning`, for choosing settings; `soup-jax evaluate` scores
`final`, so that no choice was made on what it reports.
"""

import dataclasses
import glob
import hashlib
import math
import pathlib
from collections.abc import Sequence

import numpy as np
from ml_collections import ConfigDict

from soup_jax import remote
from soup_jax import storage as files
from soup_jax.data.corpus import Corpus
from soup_jax.data.domain_histogram import DocumentHistogram, document_histogram
from soup_jax.data.sources import hash_fraction
from soup_jax.data.tokenizer import Tokenizer
from soup_jax.errors import UserError
from soup_jax.evaluation.sample import read_sample


@dataclasses.dataclass(frozen=True)
class TokenSet:
    """Windows to score: tokens [n, L + 1], real targets of each [n], bytes those stand for."""

    tokens: np.ndarray
    num_targets: np.ndarray
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class SpecialistSet:
    """One specialist: its domain weights from one part of its documents, windows of the other.

    Attributes:
      num_in_training: documents that are not scored because they are in the training text, word
        for word; None if no corpus knows.
    """

    name: str
    histogram: DocumentHistogram
    scored: TokenSet
    num_in_training: int | None = None


def document_sets(patterns: Sequence[str]) -> dict[str, str]:
    """Name -> path of the specialist files; the name is the file's without its suffixes.

    Raises:
      UserError: a pattern matches nothing, or two files have one name.
    """
    found: dict[str, str] = {}
    for pattern in patterns:
        files.refuse_address(pattern, objects=True)
        if remote.is_object(pattern):
            paths = [found.address for found in remote.find(pattern)]
        else:
            paths = sorted(glob.glob(pattern, recursive=True))
        if not paths:
            hint = ""
            if "," in pattern:
                names = ",".join(repr(name.strip()) for name in pattern.split(","))
                hint = (
                    f'. Several are a tuple in a config, --config.evaluate.specialists="({names})"'
                    ", and in `evaluate` a --specialists each"
                )
            raise UserError(f"no specialist file matches {pattern!r}{hint}")
        for path in paths:
            name = pathlib.Path(path).name.split(".")[0]
            if found.setdefault(name, path) != path:
                raise UserError(f"two specialist files are named {name!r}: {found[name]}, {path}")
    return found


PARTS = ("final", "tuning")


def part_fraction(digest: bytes) -> float:
    """Where a specialist's document falls among its parts: a number in [0, 1), fixed by its text.

    It is independent of `sources.hash_fraction`, which splits a corpus: else the documents of a
    corpus's validation split would all fall into the part that gives h.

    Args:
      digest: the document's `text_hash`.
    """
    return hash_fraction(hashlib.blake2b(digest, person=b"specialist parts").digest())


def specialist_set(
    name: str,
    path: str,
    corpus: Corpus,
    cfg: ConfigDict,
    *,
    part: str = "final",
    others: Sequence[Corpus] = (),
) -> SpecialistSet:
    """One specialist's histogram and windows; arguments and errors as of `split_documents`."""
    for_h, scored, num_in_training = split_documents(
        name, path, corpus, cfg, part=part, others=others
    )
    return SpecialistSet(
        name,
        document_histogram(corpus, for_h),
        pack(
            corpus.tokenizer(),
            scored,
            eos_id=corpus.eos_id,
            seq_len=corpus.seq_len,
            max_windows=cfg.evaluate.max_windows,
        ),
        num_in_training,
    )


def split_documents(
    name: str,
    path: str,
    corpus: Corpus,
    cfg: ConfigDict,
    *,
    part: str = "final",
    others: Sequence[Corpus] = (),
) -> tuple[list[str], list[str], int | None]:
    """(texts that give h, texts to score, how many of these were left out) of one specialist.

    What the network was trained on is not scored, as it would look better than unseen text; it may
    give h. How many that are is None if no corpus knows.

    Args:
      part: of the documents, to score: one of PARTS. With `evaluate.tuning_fraction` = 0 there is
        no tuning part, and both names mean all documents that do not give h.
      others: corpora of runs that are compared; what is in their training text is not scored.

    Raises:
      UserError: a part of the split is empty.
    """
    sample = read_sample([path], text_field=cfg.corpus.text_field)
    end_h = cfg.evaluate.histogram_fraction
    start, end = end_h + cfg.evaluate.tuning_fraction, 1.0
    if part == "tuning" and cfg.evaluate.tuning_fraction:
        start, end = end_h, start
    place = [(d, part_fraction(d.hash)) for d in sample.documents]
    for_h = [d.text for d, at in place if at < end_h]
    candidates = [d for d, at in place if start <= at < end]
    hashes = [d.hash for d in candidates]
    seen = [s for c in (corpus, *others) if (s := c.trained_on(hashes)) is not None]
    trained_on = np.any(seen, axis=0) if seen else np.zeros(len(hashes), bool)
    scored = [d.text for d, known in zip(candidates, trained_on) if not known]
    if not for_h or not scored:
        known = f", and {trained_on.sum()} in the training text" if trained_on.any() else ""
        raise UserError(
            f"specialist {name!r} ({path}) has {len(for_h)} documents for h and {len(scored)} to "
            f"score (part {part!r}){known}; both need some: give more documents or change "
            "evaluate.histogram_fraction and evaluate.tuning_fraction"
            + "".join(f". {line}" for line in [*sample.warnings(), *sample.damage])
        )
    return for_h, scored, int(trained_on.sum()) if seen else None


def pack(
    tokenizer: Tokenizer, texts: Sequence[str], *, eos_id: int, seq_len: int, max_windows: int
) -> TokenSet:
    """Texts as windows of training; every token of the kept windows is scored once."""
    stream = [eos_id]
    for ids in tokenizer.encode_batch(list(texts)):
        stream += [*ids, eos_id]
    count = max(math.ceil((len(stream) - 1) / seq_len), 1)
    padded = np.full(count * seq_len + 1, eos_id, np.int32)
    padded[: len(stream)] = stream
    tokens = np.stack([padded[i * seq_len : (i + 1) * seq_len + 1] for i in range(count)])
    real = np.full(count, seq_len, np.int32)
    real[-1] = len(stream) - 1 - (count - 1) * seq_len
    return _token_set(tokenizer, tokens, real, max_windows)


def validation_set(corpus: Corpus, *, max_windows: int) -> TokenSet:
    """The generic validation split, or `max_windows` of it evenly spread over all domains.

    Raises:
      UserError: the corpus has no validation windows.
    """
    total = int(corpus.offsets["validation"][-1])
    if not total:
        raise UserError(
            f"{corpus.path} has no validation windows; prepare with a larger "
            "corpus.validation_fraction"
        )
    ids = _spread(total, max_windows)
    tokens = corpus.read_windows("validation", ids)
    real = corpus.num_targets("validation", ids)
    return _token_set(corpus.tokenizer(), tokens, real, 0)


def _spread(total: int, most: int) -> np.ndarray:
    if not most or total <= most:
        return np.arange(total)
    return (np.arange(most) * total) // most


def _token_set(
    tokenizer: Tokenizer, tokens: np.ndarray, real: np.ndarray, max_windows: int
) -> TokenSet:
    kept = _spread(len(tokens), max_windows)
    tokens, real = tokens[kept], real[kept]
    num_bytes = sum(tokenizer.num_bytes(row[1 : 1 + n]) for row, n in zip(tokens, real))
    return TokenSet(tokens, real, num_bytes)
