"""Rows of token ids that are continued together, each at a place and with settings of its own.

Few compiled functions serve all prompts: some read a prompt of up to so many tokens, some add STEPS
tokens to so many rows at once. Rows are of one network, or of one with coefficients by row
(soup_jax/soup/low_rank.py). A network with a key-value cache (`BaseModel.decode`) reads each
token once; for another a row's cache is its last `seq_len` ids, and each token is a pass over them.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params
from soup_jax.soup.low_rank import with_coefficients

# Tokens of one call of the compiled function: what is computed beyond a row's end is thrown away,
# and the calls of a small network cost as much as its arithmetic.
STEPS = 8
_SHORTEST = 16  # prompts are padded to this, or a power of two times as much
_SHORTEST_CACHE = 128
_TOGETHER = 4  # prompts of a length that are read by one call, if there are so many
_TOGETHER_LEN = 128  # and no longer: logits of all their positions are held at one time
_BLOCK = 64  # tokens that are summed first when one is drawn


class _Network(NamedTuple):
    # What compiled functions are made for; they are shared by all decoders with the same.
    decode: Callable[..., Any] | None
    logits: Callable[[Params, Array], Array] | None
    cache_len: int
    nucleus: bool  # whether any row asks for top_p: it takes a sort of all logits

    def prefill(self, params: Any, tokens_RL: Array, length_R: Array) -> tuple[Any, Array]:
        """(cache, logits [R, V] after each prompt) of padded prompts; the cache is as long."""
        cache: Any = (tokens_RL, length_R)
        if self.decode is not None:
            # Causal attention never sees the padding behind a prompt, and decoding overwrites it.
            start_R = jnp.zeros_like(length_R)
            cache_len = tokens_RL.shape[1]
            logits, cache = self.decode(params, tokens_RL, start_R, None, cache_len=cache_len)
        else:
            assert self.logits is not None
            logits = self.logits(params, tokens_RL)
        return cache, logits[jnp.arange(len(length_R)), length_R - 1]

    def next(self, params: Any, cache: Any, token_R: Array, at_R: Array) -> tuple[Any, Array]:
        """(cache, logits [R, V]) after one more token of each row, which is its `at`-th."""
        if self.decode is not None:
            logits, cache = self.decode(
                params, token_R[:, None], at_R, cache, cache_len=self.cache_len
            )
            return cache, logits[:, -1]
        tokens_RL, length_R = cache
        full_R = length_R == self.cache_len
        tokens_RL = jnp.where(full_R[:, None], jnp.roll(tokens_RL, -1, axis=1), tokens_RL)
        length_R = jnp.minimum(length_R + 1, self.cache_len)
        tokens_RL = tokens_RL.at[jnp.arange(len(length_R)), length_R - 1].set(token_R)
        return self.prefill(params, tokens_RL, length_R)


class _Rows(NamedTuple):
    # Of every row: its newest token, which no cache has yet, and that token's place.
    cache: Any
    token: Array
    at: Array
    number: Array  # of tokens that were drawn: each draw has a key of its own
    key: Array
    temperature: Array
    top_p: Array
    alpha: Array  # coefficients, of parameters that are not merged


def _sample(network: _Network, logits_V: Array, row: Any) -> Array:
    scaled = logits_V / jnp.where(row.temperature > 0, row.temperature, 1.0)
    p_V = jnp.exp(scaled - scaled.max())
    if network.nucleus:
        # The likeliest tokens that have top_p of the probability together; always the likeliest.
        order = jnp.argsort(-p_V)
        before_V = jnp.cumsum(p_V[order]) - p_V[order]
        kept_V = (before_V < row.top_p * p_V.sum()) | (row.top_p >= 1)
        p_V = p_V * jnp.zeros_like(scaled, bool).at[order].set(kept_V.at[0].set(True))
    # One number for a draw: to draw one for each token took a small network half of its time. The
    # sum that reaches it is found among blocks of tokens, then in one: a sum along all is slow.
    p_NC = jnp.pad(p_V, (0, -len(p_V) % _BLOCK)).reshape(-1, _BLOCK)
    below_N = jnp.cumsum(p_NC.sum(axis=1))
    uniform = jax.random.uniform(jax.random.fold_in(row.key, row.number))
    number = uniform * below_N[-1]
    block = jnp.minimum(jnp.sum(below_N <= number), len(below_N) - 1)
    below_C = jnp.where(block > 0, below_N[block - 1], 0.0) + jnp.cumsum(p_NC[block])
    # By rounding the sum of the last block may stay below the number.
    last = jnp.max(jnp.where(p_NC[block] > 0, jnp.arange(_BLOCK), 0))
    drawn = block * _BLOCK + jnp.minimum(jnp.sum(below_C <= number), last)
    return jnp.where(row.temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


def _sample_rows(network: _Network, logits_RV: Array, rows: _Rows) -> Array:
    rows = rows._replace(cache=None)
    return jax.vmap(lambda logits_V, row: _sample(network, logits_V, row))(logits_RV, rows)


@functools.partial(jax.jit, static_argnums=0)
def _prefill(network: _Network, params: Any, tokens_RL: Array, rows: _Rows) -> _Rows:
    params = with_coefficients(params, rows.alpha)
    cache, logits_RV = network.prefill(params, tokens_RL, rows.at)
    token_R = _sample_rows(network, logits_RV, rows)
    return rows._replace(cache=cache, token=token_R, number=rows.number + 1)


@jax.jit
def _picked(rows: _Rows, index_R: Array) -> _Rows:
    return jax.tree.map(lambda x: x[index_R], rows)


@functools.partial(jax.jit, static_argnums=0)
def _resized(network: _Network, params: Any, rows: _Rows) -> _Rows:
    # With caches of the network's length, whatever dimensions of theirs that is.
    params = with_coefficients(params, rows.alpha)
    tokens_RL = jnp.zeros((len(rows.at), network.cache_len), jnp.int32)
    wanted = jax.eval_shape(network.prefill, params, tokens_RL, rows.at)[0]

    def fit(x: Array, like: Any) -> Array:
        x = x[tuple(slice(size) for size in like.shape)]
        return jnp.pad(x, [(0, size - here) for size, here in zip(like.shape, x.shape)])

    return rows._replace(cache=jax.tree.map(fit, rows.cache, wanted))


@functools.partial(jax.jit, donate_argnums=0)
def _insert(rows: _Rows, index_R: Array, new: _Rows) -> _Rows:
    # The cache of a prompt, which is as long as the prompt, is the beginning of the row's.
    def put(x: Array, y: Array) -> Array:
        for i in range(len(y)):
            start: list[Any] = [index_R[i], *[0] * (x.ndim - 1)]
            x = jax.lax.dynamic_update_slice(x, y[i : i + 1], start)
        return x

    return jax.tree.map(put, rows, new)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(network: _Network, params: Any, rows: _Rows) -> tuple[_Rows, Array]:
    params = with_coefficients(params, rows.alpha)

    def step(rows: _Rows, _: None) -> tuple[_Rows, Array]:
        # Rows that are done go on without use, at the cache's last place.
        at_R = jnp.minimum(rows.at, network.cache_len - 1)
        cache, logits_RV = network.next(params, rows.cache, rows.token, at_R)
        token_R = _sample_rows(network, logits_RV, rows)
        rows = rows._replace(cache=cache, token=token_R, at=rows.at + 1, number=rows.number + 1)
        return rows, token_R

    return jax.lax.scan(step, rows, length=STEPS)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    Attributes:
      temperature: 0 takes the likeliest token.
      top_p: the likeliest tokens that have this much of the probability together are drawn from.
      seed: the same call gives the same tokens; of rows together up to the rounding of sums.
    """

    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0


DEFAULT_SAMPLING = Sampling()


class Prompt(NamedTuple):
    """What a row begins with.

    Attributes:
      ids: at least one; of more than `seq_len` the last ones are read.
      alpha_E: coefficients, where the parameters are not merged.
    """

    ids: list[int]
    sampling: Sampling
    alpha_E: tuple[float, ...] = ()


def prepared(model: BaseModel, params: Params) -> Any:
    """Parameters as a `Decoder` of that network takes them, made once for all its calls."""
    if model.decode is None or model.decode_params is None:
        return jax.device_put(params)
    return _prepared(model.decode_params, params)


@functools.partial(jax.jit, static_argnums=0)
def _prepared(decode_params: Callable[[Params], Any], params: Params) -> Any:
    return decode_params(params)


class Decoder:
    """Texts of one network, whose `prepared` parameters are given at each call.

    Rows are independent: one may be admitted while others are in the middle of their texts. `keep`
    says how many there are, and how long their texts.
    """

    def __init__(self, model: BaseModel, *, seq_len: int, most: int):
        """No row is in use yet.

        Args:
          seq_len: tokens of the training windows; of a longer prompt the last ones are read.
          most: tokens of a text, as `lane_length` says.

        Raises:
          UserError: the network is no language model.
        """
        if model.decode is None and model.logits is None:
            raise UserError("this network cannot generate: its BaseModel has no `logits`")
        self._model, self._seq_len, self._most = model, seq_len, most
        self._length = 0  # of the caches
        self._rows: _Rows | None = None
        self.num_rows = 0

    def prompt_len(self, ids: Sequence[int]) -> int:
        """Tokens of a prompt that are read."""
        return min(len(ids), self._seq_len)

    def keep(self, params: Any, indices: Sequence[int], num_rows: int, text_len: int) -> None:
        """Make the rows `indices` the first of `num_rows`; the others may be admitted to.

        Args:
          text_len: tokens of the longest text in use after the next `advance`. Attention reads
            caches whole: they are about as long.
        """
        length = cache_length(self._model, most=self._most, text_len=text_len)
        longer, self._length = length != self._length, length
        moved = num_rows != self.num_rows or list(indices) != list(range(len(indices)))
        self.num_rows = num_rows
        if self._rows is not None and moved:
            filled = [*indices, *[0] * (num_rows - len(indices))]
            self._rows = _picked(self._rows, jnp.asarray(filled, jnp.int32))
        if self._rows is not None and longer:
            self._rows = _resized(self._network(), params, self._rows)

    def _network(self, *, nucleus: bool = False) -> _Network:
        return _Network(self._model.decode, self._model.logits, self._length, nucleus)

    def admit(
        self, params: Any, prompts: Sequence[Prompt], indices: Sequence[int]
    ) -> list[tuple[list[int], Array]]:
        """Read prompts, which take the rows `indices`.

        Returns:
          (rows, the first token after the prompt of each) of those that were read together.
        """
        by_length: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            padded = self._length
            if self._model.decode is not None:
                length = self.prompt_len(prompt.ids)
                padded = min(_up(length, _SHORTEST, factor=2), padded)
            by_length.setdefault(padded, []).append(i)
        found = []
        for padded, group in by_length.items():
            while group:
                together = len(group) >= _TOGETHER and padded <= _TOGETHER_LEN
                number = _TOGETHER if together else 1
                part, group = group[:number], group[number:]
                new = self._read(params, [prompts[i] for i in part], padded)
                places = [indices[i] for i in part]
                if self._rows is None:
                    free = _picked(new, jnp.zeros(self.num_rows, jnp.int32))
                    self._rows = _resized(self._network(), params, free)
                self._rows = _insert(self._rows, jnp.asarray(places, jnp.int32), new)
                found.append((places, new.token))
        return found

    def _read(self, params: Any, prompts: Sequence[Prompt], padded: int) -> _Rows:
        tokens_RL = np.zeros((len(prompts), padded), np.int32)
        lengths = []
        for tokens_L, prompt in zip(tokens_RL, prompts):
            ids = prompt.ids[-self._seq_len :]
            tokens_L[: len(ids)] = ids
            lengths.append(len(ids))
        samplings = [prompt.sampling for prompt in prompts]
        rows = _Rows(
            cache=None,
            token=jnp.zeros(len(prompts), jnp.int32),
            at=jnp.asarray(lengths, jnp.int32),
            number=jnp.zeros(len(prompts), jnp.int32),
            key=jnp.stack([jax.random.key(s.seed) for s in samplings]),
            temperature=jnp.asarray([s.temperature for s in samplings], jnp.float32),
            top_p=jnp.asarray([s.top_p for s in samplings], jnp.float32),
            alpha=jnp.asarray([prompt.alpha_E for prompt in prompts], jnp.float32),
        )
        network = self._network(nucleus=any(s.top_p < 1 for s in samplings))
        if network.decode is not None:
            network = network._replace(cache_len=0)  # its cache is as long as the prompt
        return _prefill(network, params, tokens_RL, rows)

    def advance(self, params: Any, *, nucleus: bool) -> Array:
        """int32 [STEPS, rows]: the next tokens of all rows; those not in use get some too.

        Args:
          nucleus: whether any row in use has a top_p below 1.
        """
        assert self._rows is not None
        network = self._network(nucleus=nucleus)
        self._rows, token_SR = _advance(network, params, self._rows)
        return token_SR


def lane_length(model: BaseModel, *, seq_len: int, text_len: int) -> int:
    """Most tokens of a text that is decoded beside one of `text_len`: attention reads the caches of
    all rows as far as the longest goes, so none pays for more than four times its own."""
    return _up(text_len, 2 * _SHORTEST_CACHE, factor=4) if model.decode is not None else seq_len


def cache_length(model: BaseModel, *, most: int, text_len: int) -> int:
    """That of texts of up to `text_len` tokens now, and of up to `most` (`lane_length`) later; few,
    so that they share compilations."""
    if model.decode is None:
        return most
    return min(_up(text_len, _SHORTEST_CACHE, factor=4), most)


def _up(number: int, least: int, *, factor: int) -> int:
    while least < number:
        least *= factor
    return least


def num_rows_for(number: int, most: int) -> int:
    """As many as there are compiled functions for: a power of four, or the most there may be."""
    return min(_up(number, 1, factor=4), most)


@functools.lru_cache(maxsize=256)
def cache_bytes(model: BaseModel, length: int) -> int:
    """Of one row."""
    if model.decode is None:
        return 4 * length
    decode = functools.partial(model.decode, cache_len=length)
    tokens, start = jnp.zeros((1, 1), jnp.int32), jnp.zeros(1, jnp.int32)
    prepared = model.decode_params or (lambda params: params)

    def cache(key: Array) -> Any:
        return decode(prepared(model.init(key)), tokens, start, None)[1]

    return tree.num_bytes(jax.eval_shape(cache, jax.random.key(0)))
