"""Byte-level BPE: train one, load one, text to ids and back.

The tokenizer that `train_tokenizer` makes has no normaliser and adds no space, so any text that
UTF-8 can hold comes back exactly: `decode(encode(text)) == text`. Its one special token,
`<|endoftext|>` (id 0), ends every document and pads the last window of a domain; the same
characters inside a text are encoded as ordinary text and never become that token.

This is not a wrapper for model hubs: `load_tokenizer` reads a `tokenizer.json` from disk and
nothing else. A foreign file may normalise text; the round trip is then as good as that file.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from soup_jax import storage as files
from soup_jax.errors import UserError
from soup_jax.inputs import read_text

EOS = "<|endoftext|>"
MIN_VOCAB_SIZE = 257  # 256 bytes and EOS
# How the tokenizers of public models spell "end of text"; the first one found is taken.
EOS_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<|end|>")
# encode_batch answers with objects of about 100 bytes a token; this much at a time keeps that small
# beside the documents themselves.
_BATCH_DOCUMENTS = 256
_BATCH_CHARS = 4_000_000
# BPE learns from words, and its time grows with the square of a word's length: a megabyte without a
# space would take hours. Words are cut to this many bytes for training, and never for encoding. No
# word of ordinary text is as long, in scripts without spaces neither; 256 would be hardly faster.
_TRAINING_WORD_BYTES = 1024


class Tokenizer:
    """Text to token ids and back; ids are in [0, vocab_size)."""

    def __init__(self, inner: tokenizers.Tokenizer):
        # The flag is not part of tokenizer.json, so it is set on every path that builds one:
        # "<|endoftext|>" written in a document must not end it.
        inner.encode_special_tokens = True
        inner.no_padding()
        inner.no_truncation()
        self._inner = inner
        vocab = inner.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocab.values()) + 1  # ids may have holes; the model needs all
        self.eos_id: int = next((vocab[name] for name in EOS_NAMES if name in vocab), -1)
        self._json = inner.to_str(pretty=True)
        self._bytes_V = _token_bytes(inner, self.vocab_size)
        self.hash: str = files.sha256_bytes(self._json.encode())

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; no EOS is added."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text; uses the threads of `tokenizers`."""
        return [encoded.ids for encoded in self._encoded(texts)]

    def lengths(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [n]: how many tokens each text has; they are not kept."""
        return np.array([len(encoded) for encoded in self._encoded(texts)], np.int64)

    def _encoded(self, texts: Sequence[str]) -> Iterator[tokenizers.Encoding]:
        batch: list[str] = []
        size = 0
        for i, text in enumerate(texts, start=1):
            batch.append(text)
            size += len(text)
            if len(batch) == _BATCH_DOCUMENTS or size >= _BATCH_CHARS or i == len(texts):
                yield from self._inner.encode_batch_fast(batch, add_special_tokens=False)
                batch, size = [], 0

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; a character cut in the middle becomes U+FFFD."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=False)

    def num_bytes(self, ids: Sequence[int] | np.ndarray) -> int:
        """Bytes of text that the tokens stand for; EOS stands for none.

        Exact for byte-level tokenizers, even where a slice of a text cuts a character; others are
        decoded, and a cut character counts as U+FFFD (three bytes).
        """
        ids = np.asarray(ids, np.int64)
        ids = ids[ids != self.eos_id]
        if self._bytes_V is not None:
            return int(self._bytes_V[ids].sum())
        return len(self.decode(ids).encode())

    def encodes_like(self, other: "Tokenizer") -> bool:
        """Whether both are the same, but for what is added around a text."""
        mine, theirs = (json.loads(t._json) for t in (self, other))
        for settings in (mine, theirs):
            settings.pop("post_processor", None)
        return bool(mine == theirs)

    def save(self, path: str | os.PathLike) -> None:
        """Write a `tokenizer.json` that any user of `tokenizers` can load."""
        files.write_text(path, self._json)


def _token_bytes(inner: tokenizers.Tokenizer, vocab_size: int) -> np.ndarray | None:
    # A byte-level tokenizer spells each byte as one character; its added tokens stand for their
    # own text.
    if not isinstance(inner.decoder, decoders.ByteLevel):
        return None
    added = inner.get_added_tokens_decoder()
    bytes_V = np.zeros(vocab_size, np.int64)
    for token, index in inner.get_vocab(with_added_tokens=True).items():
        bytes_V[index] = len(token.encode()) if index in added else len(token)
    return bytes_V


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE; the result depends only on the texts (as a set) and the size.

    Words of more than 1,024 bytes are cut to that size for training, so that its time is in
    proportion to the text. A text too small for `vocab_size` merges gives fewer tokens: look at the
    result's `vocab_size`.

    Raises:
      UserError: `vocab_size` has no room for the 256 bytes and EOS, or there is no text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise UserError(
            f"vocab_size is {vocab_size}; a byte-level tokenizer needs at least {MIN_VOCAB_SIZE} "
            "(256 bytes and the end-of-text token)"
        )
    texts = iter(texts)
    first = next(texts, None)
    if first is None:
        raise UserError("there is no text to train the tokenizer on: no train document was found")
    inner = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    # After `words` a character stands for a byte.
    cut = pre_tokenizers.Split(tokenizers.Regex(f".{{{_TRAINING_WORD_BYTES}}}"), "isolated")
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, cut])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    inner.train_from_iterator(itertools.chain([first], texts), trainer)
    inner.pre_tokenizer = words
    return Tokenizer(inner)


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """Read a `tokenizer.json`.

    Raises:
      UserError: no such file, not a tokenizer, or none of EOS_NAMES is in its vocabulary.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        path = path / "tokenizer.json"
    text = read_text(path)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as e:  # the library raises bare Exception
        raise UserError(f"{path} is not a tokenizer.json that `tokenizers` can load: {e}") from e
    tokenizer = Tokenizer(inner)
    if tokenizer.eos_id < 0:
        raise UserError(
            f"{path} has no end-of-text token; one of {', '.join(EOS_NAMES)} must be in its "
            "vocabulary, because it separates the documents"
        )
    return tokenizer
