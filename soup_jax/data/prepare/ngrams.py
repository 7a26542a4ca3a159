"""Word n-grams of documents as hashes, and MinHash signatures of their sets.

A word is a run of letters and digits of the lower-cased text, after compatibility normalisation
(NFKC): case, punctuation, white space and typographic forms of a character make no difference. An
ideograph is a word by itself. Hashes are uint64, polynomials over the
bytes of a word and over the words of an n-gram, with their bits mixed; all in numpy, over many
documents at once.

The signature of a document has, for each of NUM_HASHES random functions, the least value over its
n-grams. Two signatures agree in a share of places whose expectation is the Jaccard similarity of
the two sets, shared n-grams over all n-grams (Broder 1997).
"""

import functools
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

BANDS, ROWS = 14, 8  # candidates share a band: 92% of pairs at similarity 0.8, 5% at 0.5
NUM_HASHES = BANDS * ROWS
_PIECE_BYTES = 1 << 20  # of text hashed at once
_PRIME = np.uint64(0x100000001B3)
_STEP = np.uint64(0x9E3779B97F4A7C15)
_SHIFT = np.uint64(32)


def ngrams(texts: Sequence[str], size: int) -> tuple[np.ndarray, np.ndarray]:
    """(hashes uint64, ends int64 [n]): the different n-grams of each text, sorted, and their ends.

    A text of fewer words than `size` has one n-gram, of all of them; one without words has none.
    """
    parts, counts = [], []
    for data, offsets in _pieces(texts):
        hashes, document = _ngrams(data, offsets, size)
        order = np.lexsort((hashes, document))
        hashes, document = hashes[order], document[order]
        new = np.ones(len(hashes), bool)
        new[1:] = (hashes[1:] != hashes[:-1]) | (document[1:] != document[:-1])
        parts.append(hashes[new])
        counts.append(np.bincount(document[new], minlength=len(offsets) - 1))
    ends = np.cumsum(np.concatenate([np.zeros(0, np.int64), *counts]))
    return np.concatenate([np.zeros(0, np.uint64), *parts]), ends


def signatures(texts: Sequence[str], size: int) -> np.ndarray:
    """uint32 [n, NUM_HASHES]; all ones for a text without words."""
    hashes, ends = ngrams(texts, size)
    found = np.full((len(texts), NUM_HASHES), 0xFFFFFFFF, np.uint32)
    begins = np.concatenate([[0], ends])[:-1]
    some = np.flatnonzero(ends > begins)
    if len(some):
        for j, (factor, addend) in enumerate(_functions()):
            values = ((hashes * factor + addend) >> _SHIFT).astype(np.uint32)
            found[some, j] = np.minimum.reduceat(values, begins[some])
    return found


def bands(signature: np.ndarray) -> np.ndarray:
    """uint64 [n, BANDS]: a hash of each ROWS places; documents that share one are candidates."""
    parts = signature.reshape(len(signature), BANDS, ROWS).astype(np.uint64)
    return _mixed((parts * _powers(_STEP, ROWS)).sum(axis=2, dtype=np.uint64))


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """float64 [n]: the estimated Jaccard similarity of the rows of two arrays of signatures."""
    return (left == right).mean(axis=1)


def _plain(text: str) -> str:
    if text.isascii():
        return text.lower()
    # What is no letter or digit in any script; in ASCII the table of bytes knows it.
    return re.sub(r"[^\w\x00-\x7f]+", " ", unicodedata.normalize("NFKC", text).lower())


def _pieces(texts: Sequence[str]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    # Bytes of whole documents, some _PIECE_BYTES of them, and where each begins and the last ends.
    encoded: list[bytes] = []
    size = 0
    for i, text in enumerate(texts):
        encoded.append(_plain(text).encode("utf-8", "surrogatepass") + b" ")
        size += len(encoded[-1])
        if size >= _PIECE_BYTES or i == len(texts) - 1:
            offsets = np.concatenate([[0], np.cumsum([len(e) for e in encoded])])
            yield np.frombuffer(b"".join(encoded), np.uint8), offsets
            encoded, size = [], 0


def _ngrams(data: np.ndarray, offsets: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    words, starts = _words(data)
    document = np.searchsorted(offsets, starts, side="right") - 1
    count = np.bincount(document, minlength=len(offsets) - 1)
    hashes = np.zeros(max(len(words) - size + 1, 0), np.uint64)
    for j, power in enumerate(_powers(_STEP, size)):
        hashes += words[j : j + len(hashes)] * power
    owner = document[: len(hashes)]
    inside = owner == document[size - 1 :][: len(hashes)]
    short = np.flatnonzero((count > 0) & (count < size))
    first = np.concatenate([[0], np.cumsum(count)])
    whole = [
        (words[first[d] : first[d + 1]] * _powers(_STEP, int(count[d]))).sum(dtype=np.uint64)
        for d in short
    ]
    hashes = np.concatenate([hashes[inside], np.array(whole, np.uint64)])
    return _mixed(hashes), np.concatenate([owner[inside], short])


def _words(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    # Hashes of all words, and where they begin.
    letter = _letters()[data]
    ideograph = (data >= 0xE3) & (data <= 0xE9)  # the first byte of one
    start = letter.copy()
    start[1:] &= ~letter[:-1] | ideograph[1:]
    starts = np.flatnonzero(start)
    boundaries = np.append(np.flatnonzero(start | ~letter), len(data))
    ends = boundaries[np.searchsorted(boundaries, starts, side="right")]
    # The sum of byte * PRIME ** place up to each byte: a word's is a difference of two, divided by
    # the power of its beginning. All modulo 2 ** 64, where an odd number can be divided by.
    powers = _powers(_PRIME, 1 << max(len(data).bit_length(), 20))
    inverse = np.uint64(pow(int(_PRIME), -1, 1 << 64))
    inverses = _powers(inverse, len(powers))
    sums = np.concatenate(
        [np.zeros(1, np.uint64), np.cumsum((data + np.uint64(1)) * powers[: len(data)])]
    )
    return _mixed((sums[ends] - sums[starts]) * inverses[starts]), starts


@functools.lru_cache(maxsize=16)
def _powers(base: np.uint64, count: int) -> np.ndarray:
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return np.multiply.accumulate(powers)


@functools.cache
def _letters() -> np.ndarray:
    table = np.zeros(256, bool)
    table[128:] = True  # of all other scripts
    table[[i for i in range(128) if chr(i).isalnum()]] = True
    return table


@functools.cache
def _functions() -> list[tuple[np.uint64, np.uint64]]:
    values = np.random.default_rng(0).integers(0, 1 << 63, (NUM_HASHES, 2), np.uint64)
    return [(np.uint64(2) * a + np.uint64(1), b) for a, b in values]


def _mixed(values: np.ndarray) -> np.ndarray:
    # The finaliser of splitmix64: every bit of the result depends on every bit of the value.
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
