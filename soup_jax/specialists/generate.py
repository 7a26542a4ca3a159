"""Continue a prompt from a specialist's folder, with a key-value cache.

    soup-jax generate --model=DIR --prompt=TEXT

It compiles two functions, whatever the prompt: one reads the padded prompt, one adds a token.
"""

import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from soup_jax.data.tokenizer import load_tokenizer
from soup_jax.errors import UserError
from soup_jax.models.llama import Llama, LlamaConfig
from soup_jax.shapes import Array, Params
from soup_jax.specialists import instantiate as specialist


@functools.partial(jax.jit, static_argnames=("module", "temperature"), donate_argnames="cache")
def _decode(
    params: Params,
    cache: Any,
    token: Array,
    position: Array,
    key: Array,
    *,
    module: Llama,
    temperature: float,
) -> tuple[Any, Array]:
    logits, updated = module.apply(
        {"params": params, "cache": cache}, token[None, None], position[None, None], mutable="cache"
    )
    logits_V = logits[0, -1]
    if temperature == 0:
        return updated["cache"], jnp.argmax(logits_V)
    return updated["cache"], jax.random.categorical(key, logits_V / temperature)


@functools.partial(jax.jit, static_argnames=("module",))
def _prefill(params: Params, tokens_L: Array, *, module: Llama) -> tuple[Any, Array]:
    logits, updated = module.apply({"params": params}, tokens_L[None], mutable="cache")
    return updated["cache"], logits[0]


def generate_ids(
    params: Params,
    config: LlamaConfig,
    prompt_ids: list[int],
    *,
    max_tokens: int,
    temperature: float = 0.8,
    seed: int = 0,
    eos_id: int | None = None,
) -> list[int]:
    """Ids that continue `prompt_ids`, up to `max_tokens` or the end-of-text token.

    Args:
      temperature: 0 takes the likeliest token.
      seed: of the sampling; the same call gives the same ids.
    """
    # Padded to powers of two so that prompts of many lengths share few compilations.
    padded = 1 << max(len(prompt_ids) - 1, 7).bit_length()
    cache_len = 1 << (padded + max_tokens - 1).bit_length()
    module = Llama(config, cache_len=cache_len)
    tokens_L = np.zeros(padded, np.int32)
    tokens_L[: len(prompt_ids)] = prompt_ids
    # Padding lies behind the prompt: causal attention never sees it, and decoding overwrites it.
    cache, logits_LV = _prefill(params, tokens_L, module=module)
    key = jax.random.key(seed)
    first = logits_LV[len(prompt_ids) - 1]
    if temperature == 0:
        token = jnp.argmax(first)
    else:
        token = jax.random.categorical(jax.random.fold_in(key, 0), first / temperature)
    ids: list[int] = []
    for i in range(max_tokens):
        ids.append(int(token))
        if ids[-1] == eos_id or i + 1 == max_tokens:
            break
        cache, token = _decode(
            params,
            cache,
            token,
            jnp.asarray(len(prompt_ids) + i),
            jax.random.fold_in(key, i + 1),
            module=module,
            temperature=temperature,
        )
    return ids


def generate(
    folder: str | pathlib.Path, prompt: str, *, max_tokens: int, temperature: float, seed: int
) -> str:
    """The text that the specialist in `folder` adds to `prompt`.

    Raises:
      UserError: not a specialist's folder, or its model is not a decoder.
    """
    params, recipe = specialist.load_specialist(folder)
    if recipe["model"].get("kind") != "llama":
        raise UserError(f"{folder}: cannot generate from model kind {recipe['model'].get('kind')}")
    fields = {k: v for k, v in recipe["model"].items() if k != "kind"}
    config = LlamaConfig(vocab_size=recipe["vocab_size"], **fields)
    tokenizer = load_tokenizer(pathlib.Path(folder) / "tokenizer.json")
    # Training windows start after an end-of-text token, and so does the prompt.
    ids = generate_ids(
        params,
        config,
        [recipe["eos_id"], *tokenizer.encode(prompt)],
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        eos_id=recipe["eos_id"],
    )
    return tokenizer.decode([i for i in ids if i != recipe["eos_id"]])
