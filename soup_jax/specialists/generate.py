"""Texts that a network adds to prompts, many at a time.

Of a prompt longer than `seq_len` the last `seq_len` tokens are read. What is added with a cache may
go beyond that: rotary positions have no end, but none was trained there, and the text gets worse.
"""

import collections
import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

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
    lane_length,
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
    request: Request
    text_len: int  # tokens so far
    left: int  # that it still wants


class _Lane:
    # Requests whose texts are of similar lengths, as rows of one decoder.

    def __init__(self, decoder: Decoder, params: Any, max_rows: int, eos_id: int | None):
        self.waiting: collections.deque[tuple[int, Request]] = collections.deque()
        self._decoder, self._params = decoder, params
        self._max_rows, self._eos_id = max_rows, eos_id
        self._rows: dict[int, _Row] = {}  # by the decoder's row; the others are free
        # What the devices are at: first tokens by their rows, and the next of all rows.
        self._first: list[tuple[list[int], Array]] = []
        self._more: Array | None = None

    def drop(self, number: int) -> None:
        self._rows = {index: row for index, row in self._rows.items() if row.number != number}
        self.waiting = collections.deque(w for w in self.waiting if w[0] != number)

    @property
    def busy(self) -> bool:
        return bool(self.waiting) or bool(self._rows)

    def start(self) -> None:
        # Hands the devices their work; nothing here waits for them. There are as many rows as are
        # needed; those in use are moved only where there are fewer then.
        wanted = num_rows_for(len(self._rows) + len(self.waiting), self._max_rows)
        kept = list(range(self._decoder.num_rows))
        if wanted < len(kept):
            kept = sorted(self._rows)
            self._rows = {place: self._rows[index] for place, index in enumerate(kept)}
        free = [index for index in range(wanted) if index not in self._rows]
        free = free[: len(self.waiting)]
        prompts = self._take(free)
        rows = self._rows.values()
        longest = max((row.text_len + min(STEPS, row.left) for row in rows), default=1)
        self._decoder.keep(self._params, kept, wanted, longest)
        self._first, self._more = [], None
        if prompts:
            self._first = self._decoder.admit(self._params, prompts, free)
        if any(row.left > (index in free) for index, row in self._rows.items()):
            nucleus = any(row.request.sampling.top_p < 1 for row in rows)
            self._more = self._decoder.advance(self._params, nucleus=nucleus)

    def _take(self, free: list[int]) -> list[Prompt]:
        # Into each row the first of those whose specialist has the fewest: none takes all for long.
        num_rows = collections.Counter(row.request.alpha_E for row in self._rows.values())
        prompts = []
        for index in free:
            order = enumerate(self.waiting)
            place, (number, request) = min(
                order, key=lambda item: (num_rows[item[1][1].alpha_E], item[0])
            )
            del self.waiting[place]
            num_rows[request.alpha_E] += 1
            prompt_len = self._decoder.prompt_len(request.prompt_ids)
            self._rows[index] = _Row(number, request, prompt_len, request.max_tokens)
            prompts.append(Prompt(request.prompt_ids, request.sampling, request.alpha_E))
        return prompts

    def finish(self) -> list[tuple[int, list[int], bool]]:
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
        eos_id: int | None,
    ):
        """Of texts whose training windows have `seq_len` tokens, and that end by the id `eos_id`.

        Args:
          max_rows: that are decoded together; more requests wait.
        """
        self._model, self._params, self._seq_len = model, prepared(model, params), seq_len
        self._max_rows, self._eos_id = max_rows, eos_id
        leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, Rows))
        self._unmerged = any(isinstance(leaf, Rows) for leaf in leaves)
        self._lanes: dict[int, _Lane] = {}
        self._started: list[_Lane] = []

    def submit(self, number: int, request: Request) -> None:
        """Queue a request for one token or more under a number of the caller's choice.

        Raises:
          UserError: the network is no language model.
          ValueError: parameters that are not merged, and no coefficients, or the other way round.
        """
        if self._unmerged != bool(request.alpha_E):
            raise ValueError("alpha_E goes with parameters that are not merged, and with no others")
        text_len = min(len(request.prompt_ids), self._seq_len) + request.max_tokens
        most = lane_length(self._model, seq_len=self._seq_len, text_len=text_len)
        if most not in self._lanes:
            decoder = Decoder(self._model, seq_len=self._seq_len, most=most)
            self._lanes[most] = _Lane(decoder, self._params, self._max_rows, self._eos_id)
        self._lanes[most].waiting.append((number, request))

    def drop(self, number: int) -> None:
        """Forget a request: nobody wants more of its text."""
        for lane in self._lanes.values():
            lane.drop(number)

    @property
    def busy(self) -> bool:
        """Whether any request waits or is in a row."""
        return any(lane.busy for lane in self._lanes.values())

    def start(self) -> None:
        """Let the devices add some tokens to every text, and go on; `finish` gets them."""
        self._started = [lane for lane in self._lanes.values() if lane.busy]
        for lane in self._started:
            lane.start()

    def finish(self) -> list[tuple[int, list[int], bool]]:
        """(number, its next ids, whether it ends by them) of every request in a row."""
        found = [found for lane in self._started for found in lane.finish()]
        self._lanes = {length: lane for length, lane in self._lanes.items() if lane.busy}
        return found

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
    length = lane_length(model, seq_len=seq_len, text_len=longest)
    max_rows = MAX_ROWS
    while max_rows > 1 and max_rows * cache_bytes(model, length) > _CACHE_BYTES:
        max_rows //= 4
    batch = Batch(model, params, max_rows=max_rows, seq_len=seq_len, eos_id=eos_id)
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
