"""The embedder "tfidf_svd": words and word pairs, TF-IDF with sublinear counts, truncated SVD.

It needs no download and no accelerator, and sees nothing of the order of words but the pairs.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import threadpoolctl

from soup_jax import storage as files
from soup_jax.data.embed import parallel
from soup_jax.data.embed.base import unit_rows
from soup_jax.errors import UserError

# Scripts that do not put spaces between words (Thai, kana, Han) count by the character: their
# "words" would be whole phrases that never come again.
_UNSPACED = "\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_TOKEN_PATTERN = f"[{_UNSPACED}]|[^\\W{_UNSPACED}]{{2,}}"
# The vocabulary is chosen on this much text, the first characters of every document: enough to rank
# 30,000 terms, and the word pairs of all the text would fill gigabytes.
_VOCABULARY_CHARS = 20_000_000
_VOCABULARY_CHARS_PER_TEXT = 4_000
_BATCH = 512


class TfidfSvd:
    """TF-IDF over words and word pairs, projected on the corpus's leading singular vectors."""

    def __init__(
        self, terms: Sequence[str], *, idf: np.ndarray, components: np.ndarray, max_chars: int
    ):
        """`terms` [F] name the columns of `idf` [F] and `components` [dim, F]."""
        self._terms, self._max_chars = list(terms), max_chars
        self._idf = np.ascontiguousarray(idf, dtype=np.float32)
        self._components = np.ascontiguousarray(components, dtype=np.float32)
        self._projection = np.ascontiguousarray(self._components.T)
        self._counter = TermCounter(self._terms)
        self.dim = self._components.shape[0]
        self.hash = files.sha256_bytes(
            files.json_text(["tfidf_svd", self._terms, max_chars]).encode()
            + self._idf.tobytes()
            + self._components.tobytes()
        )
        self.name = f"tfidf_svd-{self.dim}-{self.hash[:8]}"

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """float32 [n, dim]; only the first `max_chars` characters of a text count."""
        result = np.zeros((len(texts), self.dim), np.float32)
        for start in range(0, len(texts), _BATCH):
            batch = [text[: self._max_chars] for text in texts[start : start + _BATCH]]
            tfidf = weigh(self._counter.transform(batch), self._idf)
            result[start : start + _BATCH] = unit_rows(tfidf @ self._projection)
        return result

    def contents(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Vocabulary, hash and length for the JSON file; IDF and SVD for the other."""
        settings = {"hash": self.hash, "max_chars": self._max_chars, "vocabulary": self._terms}
        return settings, {"idf": self._idf, "components": self._components}

    @classmethod
    def load(cls, settings: dict[str, Any], tensors: dict[str, np.ndarray]) -> "TfidfSvd":
        """From what `contents` gave."""
        return cls(settings["vocabulary"], max_chars=settings["max_chars"], **tensors)

    @classmethod
    def check(cls, cfg: Any) -> None:
        """Refuse a setting that nothing would read.

        Raises:
          UserError: `cfg.path` is set.
        """
        if cfg.path:
            raise UserError(
                f"embed.path = {cfg.path!r} is not read by embed.kind = 'tfidf_svd': set "
                "--config.embed.kind=minilm, or leave the path out"
            )

    @classmethod
    def fit(cls, cfg: Any, texts: Sequence[str], *, num_workers: int = 1) -> "TfidfSvd":
        """Vocabulary, IDF and SVD of `texts`; `cfg` is the config's `embed` section.

        `dim` is lower than `cfg.dim` only when there are fewer texts or terms than that.

        Raises:
          UserError: fewer than two different words, or `cfg.max_features` below 2.
        """
        import sklearn.decomposition  # half a second; readers of a corpus never need it

        texts = [text[: cfg.max_chars] for text in texts]
        terms = _choose_terms(texts, cfg.max_features)
        if len(terms) < 2:
            raise UserError(
                f"the embedder has the one word {terms[0][:50]!r} to tell documents apart by "
                f"({len(texts)} documents, embed.max_features = {cfg.max_features}): raise "
                "--config.embed.max_features, or bring documents of more words"
            )
        counts = _count(texts, terms, num_workers)
        num_documents = np.bincount(counts.indices, minlength=len(terms))
        idf = (np.log((1 + len(texts)) / (1 + num_documents)) + 1).astype(np.float32)
        dim = min(cfg.dim, *counts.shape)
        svd = sklearn.decomposition.TruncatedSVD(dim, n_iter=5, random_state=0)
        with threadpoolctl.threadpool_limits(1):  # the same bits for any number of cores
            svd.fit(weigh(counts, idf))
        return cls(terms, idf=idf, components=svd.components_, max_chars=cfg.max_chars)


def weigh(counts: Any, idf: np.ndarray) -> Any:
    """TF-IDF of sparse term counts [n, F]: (1 + log count) * idf, rows of length 1 or zero."""
    counts = counts.astype(np.float32)
    counts.data = (1 + np.log(counts.data)) * idf[counts.indices]
    squares = np.asarray(counts.multiply(counts).sum(axis=1)).ravel()
    norm = np.sqrt(np.where(squares > 0, squares, 1)).astype(np.float32)
    counts.data /= np.repeat(norm, np.diff(counts.indptr))
    return counts


def _vectorizer(max_features: int) -> Any:
    from sklearn.feature_extraction.text import CountVectorizer

    return CountVectorizer(
        token_pattern=_TOKEN_PATTERN,
        ngram_range=(1, 2),
        max_features=max_features,
        dtype=np.float32,
    )


class TermCounter:
    """Counts of the words and word pairs `terms` [F] in texts: a CountVectorizer that knows them.

    That one looks up every pair by its text, which it has to put together, and most are not among
    the terms. Here words become numbers and pairs of numbers are found in a sorted array: 5.6
    million characters a second against 2.4 (English and multilingual text, 30,000 terms, one core).
    The result is the same.
    """

    def __init__(self, terms: Sequence[str]):
        split = [term.split(" ") for term in terms]
        words = dict.fromkeys(word for term in split for word in term)
        self._number = {word: i for i, word in enumerate(words)}
        self._unknown, self._num_terms = len(words), len(terms)  # one number for all other words
        self._find = re.compile(_TOKEN_PATTERN).findall
        self._column = np.full(len(words) + 1, -1)  # of a word that is a term by itself
        pairs = []
        for column, numbers in enumerate([self._number[word] for word in term] for term in split):
            if len(numbers) == 1:
                self._column[numbers[0]] = column
            else:
                pairs.append((*numbers, column))
        first, second, self._pair_column = np.array(sorted(pairs), np.int64).reshape(-1, 3).T
        self._pair = first * len(self._column) + second
        self._is_first, self._is_second = np.zeros((2, len(self._column)), bool)
        self._is_first[first] = self._is_second[second] = True

    def transform(self, texts: Sequence[str]) -> Any:
        """float32 sparse [n, F], columns ascending in every row."""
        import scipy.sparse

        numbers: list[int] = []
        ends = [0]
        for text in texts:
            words = self._find(text.lower())
            numbers += [self._number.get(word, self._unknown) for word in words]
            numbers.append(self._unknown)  # so that no pair reaches into the next text
            ends.append(len(numbers))
        word = np.array(numbers, np.int64)
        row = np.repeat(np.arange(len(texts)), np.diff(ends))
        single = np.flatnonzero(self._column[word] >= 0)
        double = np.flatnonzero(self._is_first[word[:-1]] & self._is_second[word[1:]])
        pair = word[double] * len(self._column) + word[double + 1]
        place = np.searchsorted(self._pair, pair)
        known = self._pair.take(place, mode="clip") == pair
        double, place = double[known], place[known]
        cells = np.concatenate(
            [
                row[single] * self._num_terms + self._column[word[single]],
                row[double] * self._num_terms + self._pair_column[place],
            ]
        )
        cells, counts = np.unique(cells, return_counts=True)
        starts = np.searchsorted(cells, np.arange(len(texts) + 1) * self._num_terms)
        parts = (counts.astype(np.float32), cells % self._num_terms, starts)
        return scipy.sparse.csr_matrix(parts, shape=(len(texts), self._num_terms))


def _choose_terms(texts: Sequence[str], max_features: int) -> list[str]:
    sample, chars = [], 0
    for text in texts:
        sample.append(text[:_VOCABULARY_CHARS_PER_TEXT])
        chars += len(sample[-1])
        if chars > _VOCABULARY_CHARS:
            break
    counter = _vectorizer(max_features)
    try:
        counter.fit(sample)
    except ValueError as e:  # "empty vocabulary"
        raise UserError(
            f"the embedder found no words in {len(texts)} documents; is corpus.text_field the "
            "field that holds the text?"
        ) from e
    return counter.get_feature_names_out().tolist()


def _count(texts: Sequence[str], terms: Sequence[str], num_workers: int) -> Any:
    import scipy.sparse

    jobs, size = [], 4 * _BATCH
    vocabulary = json.dumps(list(terms))
    for start in range(0, len(texts), size):
        jobs.append((texts[start : start + size], vocabulary))
    return scipy.sparse.vstack(
        list(parallel.parallel_map(_count_batch, jobs, num_workers=num_workers)), format="csr"
    )


def _count_batch(texts: Sequence[str], vocabulary: str) -> Any:
    return TermCounter(json.loads(vocabulary)).transform(texts)
