"""Rows of token ids that are continued together, each at a place and with settings of its own.

There are two compiled functions whatever the prompts: one reads a prompt into a row, the other adds
STEPS tokens to all rows at once. A network with a key-value cache (`BaseModel.decode`) reads each
token once; for another a row's cache is its last `seq_len` ids, and each token is a pass over them.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params

# Tokens of one call of the compiled function: what is computed beyond a row's end is thrown away,
# and the calls of a small network cost as much as its arithmetic.
STEPS = 8


class _Network(NamedTuple):
    # What compiled functions are made for; they are shared by all decoders with the same.
    decode: Callable[..., Any] | None
    logits: Callable[[Params, Array], Array] | None
    cache_len: int
    nucleus: bool  # whether any row asks for top_p: it takes a sort of all logits

    def prefill(self, params: Params, tokens_L: Array, length: Array) -> tuple[Any, Array]:
        """(cache, logits [V] after the prompt) of a padded prompt."""
        if self.decode is not None:
            # Causal attention never sees the padding behind the prompt, and decoding overwrites it.
            logits, cache = self.decode(params, tokens_L[None], 0, None, cache_len=self.cache_len)
            return cache, logits[0, length - 1]
        assert self.logits is not None
        return (tokens_L, length), self.logits(params, tokens_L[None])[0, length - 1]

    def next(self, params: Params, cache: Any, token: Array, at: Array) -> tuple[Any, Array]:
        """(cache, logits [V]) after one more token, which is the `at`-th of its row."""
        if self.decode is not None:
            logits, cache = self.decode(
                params, token[None, None], at, cache, cache_len=self.cache_len
            )
            return cache, logits[0, -1]
        tokens_L, length = cache
        full = length == self.cache_len
        tokens_L = jnp.where(full, jnp.roll(tokens_L, -1), tokens_L)
        length = jnp.minimum(length + 1, self.cache_len)
        return self.prefill(params, tokens_L.at[length - 1].set(token), length)


class _Rows(NamedTuple):
    # Of every row: its newest token, which no cache has yet, and that token's place.
    cache: Any
    token: Array
    at: Array
    number: Array  # of tokens that were drawn: each draw has a key of its own
    key: Array
    temperature: Array
    top_p: Array


def _sample(network: _Network, logits_V: Array, row: Any) -> Array:
    scaled = logits_V / jnp.where(row.temperature > 0, row.temperature, 1.0)
    if network.nucleus:
        # The likeliest tokens that have top_p of the probability together; always the likeliest.
        order = jnp.argsort(-scaled)
        p_V = jax.nn.softmax(scaled[order])
        kept_V = (jnp.cumsum(p_V) - p_V < row.top_p) | (row.top_p >= 1)
        kept_V = jnp.zeros_like(scaled, bool).at[order].set(kept_V.at[0].set(True))
        scaled = jnp.where(kept_V, scaled, -jnp.inf)
    drawn = jax.random.categorical(jax.random.fold_in(row.key, row.number), scaled)
    return jnp.where(row.temperature > 0, drawn, jnp.argmax(logits_V)).astype(jnp.int32)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _admit(
    network: _Network, params: Params, rows: _Rows, index: Array, tokens_L: Array, row: _Rows
) -> tuple[_Rows, Array]:
    cache, logits_V = network.prefill(params, tokens_L, row.at)
    row = row._replace(cache=cache, token=_sample(network, logits_V, row), number=row.number + 1)
    return jax.tree.map(lambda all_, one: all_.at[index].set(one), rows, row), row.token


@functools.partial(jax.jit, static_argnums=0, donate_argnums=2)
def _advance(network: _Network, params: Params, rows: _Rows) -> tuple[_Rows, Array]:
    last = network.cache_len - 1

    def one(row: _Rows) -> _Rows:
        # Rows that are done go on without use, at the cache's last place.
        cache, logits_V = network.next(params, row.cache, row.token, jnp.minimum(row.at, last))
        token = _sample(network, logits_V, row)
        return row._replace(cache=cache, token=token, at=row.at + 1, number=row.number + 1)

    def step(rows: _Rows, _: None) -> tuple[_Rows, Array]:
        rows = jax.vmap(one)(rows)
        return rows, rows.token

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


class Decoder:
    """`num_rows` texts of one network, with parameters that are given at each call.

    Rows are independent: one may be admitted while others are in the middle of their texts.
    """

    def __init__(self, model: BaseModel, *, num_rows: int, seq_len: int, max_len: int):
        """No row is in use yet.

        Args:
          seq_len: tokens of the training windows; of a longer prompt the last ones are read.
          max_len: tokens of a prompt, at most `seq_len` of it, and what is added to it.

        Raises:
          UserError: the network is no language model.
        """
        if model.decode is None and model.logits is None:
            raise UserError("this network cannot generate: its BaseModel has no `logits`")
        self._seq_len = seq_len
        # Powers of two, so that texts of many lengths share few compilations.
        cache_len = 1 << max(max_len - 1, 7).bit_length() if model.decode else seq_len
        self._network = _Network(model.decode, model.logits, cache_len, nucleus=False)
        self._num_rows = num_rows
        self._rows: _Rows | None = None

    def admit(self, params: Params, index: int, prompt_ids: list[int], sampling: Sampling) -> Array:
        """The first token after a prompt, which takes the row `index`."""
        if sampling.top_p < 1:
            self._network = self._network._replace(nucleus=True)
        prompt_ids = prompt_ids[-self._seq_len :]
        length = len(prompt_ids)
        if self._network.decode is not None:
            padded = min(1 << max(length - 1, 7).bit_length(), self._network.cache_len)
        else:
            padded = self._network.cache_len
        tokens_L = np.zeros(padded, np.int32)
        tokens_L[:length] = prompt_ids
        row = _Rows(
            cache=None,
            token=jnp.int32(0),
            at=jnp.int32(length),
            number=jnp.int32(0),
            key=jax.random.key(sampling.seed),
            temperature=jnp.float32(sampling.temperature),
            top_p=jnp.float32(sampling.top_p),
        )
        if self._rows is None:
            self._rows = self._empty(params, tokens_L, row)
        self._rows, token = _admit(
            self._network, params, self._rows, jnp.int32(index), tokens_L, row
        )
        return token

    def advance(self, params: Params) -> Array:
        """int32 [STEPS, rows]: the next tokens of all rows; those not in use get some too."""
        assert self._rows is not None
        self._rows, token_SR = _advance(self._network, params, self._rows)
        return token_SR

    def num_bytes(self, params: Params) -> int:
        """Of the rows' caches."""
        tokens_L = jnp.zeros(min(8, self._network.cache_len), jnp.int32)
        cache, _ = jax.eval_shape(self._network.prefill, params, tokens_L, jnp.int32(1))
        return self._num_rows * tree.num_bytes(cache)

    def _empty(self, params: Params, tokens_L: np.ndarray, row: _Rows) -> _Rows:
        cache, _ = jax.eval_shape(self._network.prefill, params, tokens_L, row.at)
        blank = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), cache)
        # Copies of one row: a typed key has no zeros.
        return jax.tree.map(
            lambda one: jnp.stack([one] * self._num_rows), row._replace(cache=blank)
        )
