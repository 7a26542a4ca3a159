"""Texts that a network adds to prompts, many at a time.

Of a prompt longer than `seq_len` the last `seq_len` tokens are read. What is added with a cache may
go beyond that: rotary positions have no end, but none was trained there, and the text gets worse.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np

from soup_jax import tree
from soup_jax.data.tokenizer import Tokenizer
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.soup.low_rank import Rows
from soup_jax.specialists.decoding import (
    DEFAULT_SAMPLING,
    STEPS,
    Decoder,
    Prompt,
    Sampling,
    cache_bytes,
    cache_length,
    num_rows_for,
    prepared,
)

# The cache, and on some devices the program, is as long as the text.
MAX_TOKENS = 1 << 16
# Decoded together, as many as have caches of so many bytes.
MAX_ROWS = 64
_CACHE_BYTES = 1 << 30
_MAX_STOPS = 16


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked for one prompt.

    Attributes:
      prompt_ids: at least one.
      max_tokens: most that are added.
      stop: texts before which what is added ends; they are no part of it.
      alpha_E: coefficients, where the parameters are not merged.
    """

    prompt_ids: list[int]
    max_tokens: int = 100
    sampling: Sampling = DEFAULT_SAMPLING
    stop: tuple[str, ...] = ()
    alpha_E: tuple[float, ...] = ()


def check(request: Request) -> None:
    """Refuse settings that mean nothing.

    Raises:
      UserError: names the setting and what it may be.
    """
    temperature, top_p = request.sampling.temperature, request.sampling.top_p
    for good, what in (
        (
            0 <= request.max_tokens <= MAX_TOKENS,
            f"max_tokens = {request.max_tokens} must be in [0, {MAX_TOKENS}]",
        ),
        (
            math.isfinite(temperature) and temperature >= 0,
            f"temperature = {temperature} must be finite and at least 0",
        ),
        (0 < top_p <= 1, f"top_p = {top_p} must be above 0 and at most 1"),
        (
            len(request.stop) <= _MAX_STOPS and all(request.stop),
            f"stop must be at most {_MAX_STOPS} texts, none of them empty",
        ),
    ):
        if not good:
            raise UserError(what)


class Text:
    """The text of ids that come one by one, as far as it is certain."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()):
        self._tokenizer = tokenizer
        self._stop = stop
        self._ids: list[int] = []
        # Ids before `_start` cannot change what comes; text of those before `_end` was returned.
        self._start = self._end = 0
        self._held = ""
        self.stopped = False

    def add(self, ids: Iterable[int]) -> str:
        """What is certain of the text after these ids and was not returned before.

        Held back are a character that is cut in the middle, and what may begin a stop text.
        """
        self._ids += ids
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        text = self._tokenizer.decode(self._ids[self._start :])
        if text.endswith("\ufffd"):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return self._until_stop(self._held + text[len(known) :])

    def rest(self) -> str:
        """What was held back, at the end of the text."""
        if self.stopped:
            return ""
        known = self._tokenizer.decode(self._ids[self._start : self._end])
        text = self._tokenizer.decode(self._ids[self._start :])
        found = self._until_stop(self._held + text[len(known) :])
        return found if self.stopped else found + self._held

    def _until_stop(self, text: str) -> str:
        self._held = ""
        places = [at for s in self._stop if (at := text.find(s)) >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        kept = max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def _overlap(text: str, stop: str) -> int:
    # How many characters at the end of a text may be the beginning of a stop text.
    sizes = range(min(len(stop) - 1, len(text)), 0, -1)
    return next((n for n in sizes if text.endswith(stop[:n])), 0)


@dataclasses.dataclass
class _Row:
    number: int  # of the request
    text_len: int  # tokens so far
    left: int  # that it still wants
    alpha_E: tuple[float, ...]


class Batch:
    """Requests to one network, decoded together; new ones may come at any time.

    Each call of `advance` takes waiting requests into free rows and adds some tokens to all.
    """

    def __init__(
        self,
        model: BaseModel,
        params: Params,
        *,
        max_rows: int,
        seq_len: int,
        text_len: int,
        eos_id: int | None,
    ):
        """Of texts whose training windows have `seq_len` tokens, and that end by the id `eos_id`.

        Args:
          max_rows: that are decoded together; more requests wait.
          text_len: most tokens of a text with its prompt.

        Raises:
          UserError: the network is no language model.
        """
        self._decoder = Decoder(model, seq_len=seq_len)
        self._params = prepared(model, params)
        self._max_rows, self._seq_len, self._text_len = max_rows, seq_len, text_len
        self._eos_id = eos_id
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Rows))
        self._unmerged = any(isinstance(leaf, Rows) for leaf in leaves)
        self._waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._rows: dict[int, _Row] = {}  # by the decoder's row; the others are free
        # What the devices are at: first tokens by their rows, and the next of all rows.
        self._first: list[tuple[list[int], Array]] = []
        self._more: Array | None = None

    @property
    def num_bytes(self) -> int:
        """Of the parameters, as they are kept."""
        return tree.num_bytes(self._params)

    def submit(self, number: int, request: Request) -> None:
        """Queue a request under a number of the caller's choice.

        Raises:
          ValueError: a text that is too long; parameters that are not merged, and no coefficients,
            or the other way round.
        """
        if self._unmerged != bool(request.alpha_E):
            raise ValueError("alpha_E goes with parameters that are not merged, and with no others")
        text_len = min(len(request.prompt_ids), self._seq_len) + request.max_tokens
        if text_len > self._text_len:
            raise ValueError(f"a text of {text_len} tokens, where {self._text_len} have room")
        self._waiting.append((number, request))

    def drop(self, number: int) -> None:
        """Forget a request: nobody wants more of its text."""
        self._rows = {index: row for index, row in self._rows.items() if row.number != number}
        self._waiting = collections.deque(w for w in self._waiting if w[0] != number)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in a row."""
        return bool(self._waiting) or bool(self._rows)

    def start(self) -> None:
        """Let the devices add some tokens to every text, and go on; `finish` gets them."""
        # As many rows as are needed; those in use are moved only where there are fewer then.
        wanted = num_rows_for(len(self._rows) + len(self._waiting), self._max_rows)
        kept = list(range(self._decoder.num_rows))
        if wanted < len(kept):
            kept = sorted(self._rows)
            self._rows = {place: self._rows[index] for place, index in enumerate(kept)}
        free = [index for index in range(wanted) if index not in self._rows]
        free = free[: len(self._waiting)]
        prompts = [self._take(index) for index in free]
        longest = max((row.text_len for row in self._rows.values()), default=1)
        self._decoder.keep(self._params, kept, wanted, min(longest + STEPS, self._text_len))
        self._first, self._more = [], None
        if prompts:
            self._first = self._decoder.admit(self._params, prompts, free)
        if any(row.left > (index in free) for index, row in self._rows.items()):
            self._more = self._decoder.advance(self._params)

    def _take(self, index: int) -> Prompt:
        # Into a row the first of those whose specialist has the fewest: none takes all for long.
        rows = collections.Counter(row.alpha_E for row in self._rows.values())
        order = enumerate(self._waiting)
        place, (number, request) = min(order, key=lambda item: (rows[item[1][1].alpha_E], item[0]))
        del self._waiting[place]
        prompt_len = min(len(request.prompt_ids), self._seq_len)
        self._rows[index] = _Row(number, prompt_len, request.max_tokens, request.alpha_E)
        return Prompt(request.prompt_ids, request.sampling, request.alpha_E)

    def finish(self) -> list[tuple[int, list[int], bool]]:
        """(number, its next ids, whether it ends by them) of every request in a row."""
        found: dict[int, list[int]] = {}  # by row
        for indices, token_R in self._first:
            found |= {i: [token] for i, token in zip(indices, np.asarray(token_R).tolist())}
        if self._more is not None:
            for index, ids in enumerate(np.asarray(self._more).T.tolist()):
                found[index] = found.get(index, []) + ids
        result = []
        for index, row in list(self._rows.items()):
            ids = found.get(index, [])
            row.text_len += len(ids)
            ids = ids[: row.left]
            end = self._eos_id
            row.left -= len(ids)
            if end is not None and end in ids:
                ids, row.left = ids[: ids.index(end) + 1], 0
            result.append((row.number, ids, not row.left))
            if not row.left:
                del self._rows[index]
        return result

    def advance(self) -> list[tuple[int, list[int], bool]]:
        """`start` and `finish`."""
        self.start()
        return self.finish()


def _batch(
    model: BaseModel,
    params: Params,
    requests: Sequence[Request],
    seq_len: int,
    eos_id: int | None,
) -> Batch:
    for request in requests:
        check(request)
    longest = max((len(r.prompt_ids[-seq_len:]) + r.max_tokens for r in requests), default=1)
    length = cache_length(model, seq_len=seq_len, text_len=longest)
    max_rows = MAX_ROWS
    while max_rows > 1 and max_rows * cache_bytes(model, length) > _CACHE_BYTES:
        max_rows //= 4
    batch = Batch(
        model, params, max_rows=max_rows, seq_len=seq_len, text_len=longest, eos_id=eos_id
    )
    for index, request in enumerate(requests):
        if request.max_tokens:
            batch.submit(index, request)
    return batch


def generate_ids(
    model: BaseModel,
    params: Params,
    prompt_ids: list[int],
    *,
    seq_len: int,
    max_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """Ids that continue one prompt, until there are `max_tokens` or the end-of-text token.

    Args:
      seq_len: tokens of the training windows.
      temperature: 0 takes the likeliest token.
      seed: of the sampling; the same call gives the same ids.
      eos_id: the end-of-text token, which is the last id of a text that ends by it.

    Raises:
      UserError: the network is no language model, or as `check`.
    """
    request = Request(prompt_ids, max_tokens, Sampling(temperature=temperature, seed=seed))
    batch = _batch(model, params, [request], seq_len, eos_id)
    ids: list[int] = []
    while batch.busy:
        for _, more, _ in batch.advance():
            ids += more
    return ids


def generate_texts(
    model: BaseModel,
    params: Params,
    tokenizer: Tokenizer,
    requests: Sequence[Request],
    *,
    seq_len: int,
    eos_id: int,
) -> Iterator[tuple[int, str]]:
    """(index of a request, what is added to its text), piece by piece, of many prompts together.

    Raises:
      UserError: as `generate_ids`.
    """
    batch = _batch(model, params, requests, seq_len, eos_id)
    texts = [Text(tokenizer, request.stop) for request in requests]
    while batch.busy:
        for index, ids, ended in batch.advance():
            text = texts[index]
            piece = text.add(i for i in ids if i != eos_id)
            if text.stopped:
                batch.drop(index)
            elif ended:
                piece += text.rest()
            if piece:
                yield index, piece
