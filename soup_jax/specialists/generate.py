"""Continue token ids with a base network: with its cache if it has one, else without.

With a cache there are two compiled functions whatever the prompt: prefill over the padded prompt,
and one token at a time. Without, each token takes a pass over the last `seq_len` tokens.

Of a prompt longer than `seq_len` the last `seq_len` tokens are read. What is added with a cache may
go beyond that: rotary positions have no end, but none was trained there, and the text gets worse.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.shapes import Array, Params

# The cache, and on some devices the program, is as long as the text.
MAX_TOKENS = 1 << 16


def _sample(logits_V: Array, key: Array, temperature: float) -> Array:
    if temperature == 0:
        return jnp.argmax(logits_V)
    return jax.random.categorical(key, logits_V / temperature)


@functools.partial(jax.jit, static_argnames=("decode", "cache_len"))
def _prefill(
    params: Params, tokens_L: Array, *, decode: Callable[..., Any], cache_len: int
) -> tuple[Any, Array]:
    logits, cache = decode(params, tokens_L[None], 0, None, cache_len=cache_len)
    return cache, logits[0]


@functools.partial(
    jax.jit, static_argnames=("decode", "cache_len", "temperature"), donate_argnames="cache"
)
def _next_by_cache(
    params: Params,
    cache: Any,
    token: Array,
    position: Array,
    key: Array,
    *,
    decode: Callable[..., Any],
    cache_len: int,
    temperature: float,
) -> tuple[Any, Array]:
    logits, cache = decode(params, token[None, None], position, cache, cache_len=cache_len)
    return cache, _sample(logits[0, -1], key, temperature)


@functools.partial(jax.jit, static_argnames=("logits", "temperature"))
def _next(
    params: Params,
    tokens_L: Array,
    last: Array,
    key: Array,
    *,
    logits: Callable[[Params, Array], Array],
    temperature: float,
) -> Array:
    return _sample(logits(params, tokens_L[None])[0, last], key, temperature)


def _by_cache(
    decode: Callable[..., Any],
    params: Params,
    prompt_ids: list[int],
    key: Array,
    max_tokens: int,
    temperature: float,
) -> Iterator[Array]:
    # Padded to powers of two so that prompts of many lengths share few compilations.
    padded = 1 << max(len(prompt_ids) - 1, 7).bit_length()
    static = {"decode": decode, "cache_len": 1 << (padded + max_tokens - 1).bit_length()}
    tokens_L = np.zeros(padded, np.int32)
    tokens_L[: len(prompt_ids)] = prompt_ids
    # Padding lies behind the prompt: causal attention never sees it, and decoding overwrites it.
    cache, logits_LV = _prefill(params, tokens_L, **static)
    token = _sample(logits_LV[len(prompt_ids) - 1], jax.random.fold_in(key, 0), temperature)
    for i in itertools.count():
        yield token
        cache, token = _next_by_cache(
            params,
            cache,
            token,
            jnp.asarray(len(prompt_ids) + i),
            jax.random.fold_in(key, i + 1),
            temperature=temperature,
            **static,
        )


def _without_cache(
    logits: Callable[[Params, Array], Array],
    params: Params,
    prompt_ids: list[int],
    key: Array,
    seq_len: int,
    temperature: float,
) -> Iterator[Array]:
    ids = list(prompt_ids)
    for i in itertools.count():
        window = ids[-seq_len:]
        tokens_L = np.zeros(seq_len, np.int32)
        tokens_L[: len(window)] = window
        token = _next(
            params,
            tokens_L,
            jnp.asarray(len(window) - 1),
            jax.random.fold_in(key, i),
            logits=logits,
            temperature=temperature,
        )
        yield token
        ids.append(int(token))


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
    """Ids that continue `prompt_ids`, up to `max_tokens` or the end-of-text token.

    Args:
      seq_len: tokens of the training windows.
      temperature: 0 takes the likeliest token.
      seed: of the sampling; the same call gives the same ids.

    Raises:
      UserError: the network is no language model, the temperature is negative or not finite, or
        `max_tokens` is above MAX_TOKENS.
    """
    if not 0 <= max_tokens <= MAX_TOKENS:
        raise UserError(f"max_tokens = {max_tokens} must be in [0, {MAX_TOKENS}]")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise UserError(f"temperature = {temperature} must be finite and at least 0")
    key, prompt_ids = jax.random.key(seed), prompt_ids[-seq_len:]
    if model.decode is not None:
        found = _by_cache(model.decode, params, prompt_ids, key, max_tokens, temperature)
    elif model.logits is not None:
        found = _without_cache(model.logits, params, prompt_ids, key, seq_len, temperature)
    else:
        raise UserError("this network cannot generate: its BaseModel has no `logits`")
    ids: list[int] = []
    for token in itertools.islice(found, max_tokens):
        ids.append(int(token))
        if ids[-1] == eos_id:
            break
    return ids
