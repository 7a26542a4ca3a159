"""Generation with the cache equals the plain network; sampling repeats; texts end where asked."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.errors import UserError
from soup_jax.models.llama import Llama, LlamaConfig
from soup_jax.specialists import instantiate as specialist
from soup_jax.specialists.generate import generate, generate_ids

CONFIG = LlamaConfig(
    vocab_size=300, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48
)


@pytest.fixture(scope="module")
def params():
    import flax.linen as nn

    tokens = jnp.zeros((1, 4), jnp.int32)
    params = nn.unbox(Llama(CONFIG).init(jax.random.key(0), tokens)["params"])
    # As initialised the network repeats its last token; noise makes the context matter.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, noisy)


def _greedy(params, prompt: list[int], num: int) -> list[int]:
    # One shape for all lengths: what lies behind a position cannot change its logits.
    ids = list(prompt)
    apply = jax.jit(Llama(CONFIG).apply)
    for _ in range(num):
        tokens = np.zeros((1, 160), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(apply({"params": params}, tokens)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 127, 128, 129])
def test_greedy_with_cache_equals_argmax_without(params, length):
    prompt = np.random.default_rng(length).integers(1, 300, length).tolist()
    found = generate_ids(params, CONFIG, prompt, max_tokens=24, temperature=0)
    assert found == _greedy(params, prompt, 24)
    assert len(set(found)) > 3  # a model that says one word proves nothing


def test_seed_decides_the_sample(params):
    def ids(seed: int) -> list[int]:
        return generate_ids(params, CONFIG, [1, 2], max_tokens=30, temperature=1.0, seed=seed)

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)


def test_shorter_request_is_a_prefix(params):
    long = generate_ids(params, CONFIG, [7], max_tokens=20, seed=1)
    assert generate_ids(params, CONFIG, [7], max_tokens=5, seed=1) == long[:5]


def test_temperature_zero_ignores_the_seed_and_a_low_one_approaches_it(params):
    greedy = generate_ids(params, CONFIG, [5, 6], max_tokens=10, temperature=0, seed=1)
    assert greedy == generate_ids(params, CONFIG, [5, 6], max_tokens=10, temperature=0, seed=2)
    assert greedy == generate_ids(params, CONFIG, [5, 6], max_tokens=10, temperature=1e-4, seed=3)


def test_high_temperature_is_near_uniform(params):
    ids = generate_ids(params, CONFIG, [5], max_tokens=200, temperature=1e4)
    assert len(set(ids)) > 100  # of 200 uniform draws from 300 about 146 differ


def test_end_of_text_stops(params):
    free = generate_ids(params, CONFIG, [1, 2, 3], max_tokens=20, temperature=0)
    eos = free[6]
    stopped = generate_ids(params, CONFIG, [1, 2, 3], max_tokens=20, temperature=0, eos_id=eos)
    assert stopped == free[: free.index(eos) + 1]


@pytest.mark.parametrize("num", [1, 2, 13])
def test_as_many_tokens_as_asked(params, num):
    assert len(generate_ids(params, CONFIG, [4], max_tokens=num)) == num


@pytest.fixture(scope="module")
def folder(tiny_run, tiny_text, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("model") / "cooking"
    specialist.instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), out)
    return out


@pytest.mark.parametrize("prompt", ["", "butter flour", "naïve 🍞 日本語 \u0301 a\nb\t"])
def test_text_from_a_folder(folder, prompt):
    first = generate(folder, prompt, max_tokens=20, temperature=0.8, seed=0)
    assert first == generate(folder, prompt, max_tokens=20, temperature=0.8, seed=0)
    assert first
    assert "<|endoftext|>" not in first
    assert not first.startswith(prompt or "\0")  # only what is added
    assert first != generate(folder, prompt, max_tokens=20, temperature=0.8, seed=1)


def test_text_is_that_of_the_ids_after_an_end_of_text_token(folder):
    from soup_jax.data.tokenizer import load_tokenizer

    params, recipe = specialist.load_specialist(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    fields = {k: v for k, v in recipe["model"].items() if k != "kind"}
    config = LlamaConfig(vocab_size=recipe["vocab_size"], **fields)
    ids = generate_ids(
        params, config, [tokenizer.eos_id, *tokenizer.encode("oven")], max_tokens=9, temperature=0
    )
    text = generate(folder, "oven", max_tokens=9, temperature=0, seed=0)
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    assert text == tokenizer.decode(ids[:end])


def test_other_kind_of_model_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["model"]["kind"] = "mixer"
    (tmp_path / "own" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="cannot generate from model kind mixer"):
        generate(tmp_path / "own", "x", max_tokens=1, temperature=0, seed=0)


def test_what_is_no_specialist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.json does not exist"):
        generate(tmp_path, "x", max_tokens=1, temperature=0, seed=0)
