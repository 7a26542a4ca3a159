"""Generation with the cache equals the plain network; sampling repeats; texts end where asked."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.models.llama import Llama, LlamaConfig, base_model
from soup_jax.specialists import generate as generate_lib
from soup_jax.specialists.decoding import Sampling
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.specialist import Specialist

CONFIG = LlamaConfig(
    vocab_size=300, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48
)


MODEL = base_model(CONFIG, seq_len=160)


def generate_ids(params, prompt, *, model=MODEL, **settings):
    return generate_lib.generate_ids(model, params, prompt, seq_len=160, **settings)


def generate(folder, prompt, **settings):
    return Specialist.load(folder).generate(prompt, **settings)


@pytest.fixture(scope="module")
def params():
    params = MODEL.init(jax.random.key(0))
    # As initialised the network repeats its last token; noise makes the context matter.
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, noisy)


def _greedy(params, prompt: list[int], num: int, config=CONFIG) -> list[int]:
    # One shape for all lengths: what lies behind a position cannot change its logits.
    ids = list(prompt)
    apply = jax.jit(Llama(config).apply)
    for _ in range(num):
        tokens = np.zeros((1, 160), np.int32)
        tokens[0, : len(ids)] = ids
        ids.append(int(jnp.argmax(apply({"params": params}, tokens)[0, len(ids) - 1])))
    return ids[len(prompt) :]


@pytest.mark.parametrize("length", [1, 5, 8, 9, 127, 128, 129])
def test_greedy_with_cache_equals_argmax_without(params, length):
    prompt = np.random.default_rng(length).integers(1, 300, length).tolist()
    found = generate_ids(params, prompt, max_tokens=24, temperature=0)
    assert found == _greedy(params, prompt, 24)
    assert len(set(found)) > 3  # a model that says one word proves nothing


def test_without_a_cache_the_same_comes(params):
    plain = dataclasses.replace(MODEL, decode=None)
    for temperature in (0, 1.0):
        cached, found = (
            generate_ids(params, [3, 1, 2], model=m, max_tokens=12, temperature=temperature)
            for m in (MODEL, plain)
        )
        assert found == cached


def test_without_a_cache_the_last_window_is_seen(params):
    plain, prompt = dataclasses.replace(MODEL, decode=None), list(range(1, 30))

    def ids(prompt: list[int]) -> list[int]:
        return generate_lib.generate_ids(
            plain, params, prompt, seq_len=8, max_tokens=4, temperature=0
        )

    assert ids(prompt) == ids(prompt[-8:])
    assert ids(prompt) != ids(prompt[:8])


def test_of_a_long_prompt_the_last_window_is_read(folder, caplog):
    long = "butter flour oven " * 100
    with caplog.at_level("WARNING", logger="soup_jax"):
        loaded = Specialist.load(folder)
        text = loaded.generate(long, max_tokens=9, temperature=0)
        loaded.generate("butter", max_tokens=40)
    ids = loaded.tokenizer.encode(long)
    same = generate_lib.generate_ids(
        loaded.model,
        loaded.params,
        ids[-32:],
        seq_len=32,
        max_tokens=9,
        temperature=0,
        eos_id=loaded.recipe["eos_id"],
    )
    assert text == loaded.tokenizer.decode(same)
    assert f"has {len(ids)} tokens, more than the 32" in caplog.messages[0]
    assert "the windows that the model was trained on 32: beyond" in caplog.messages[1]


def test_what_cannot_generate_is_refused(params):
    regression = dataclasses.replace(MODEL, decode=None, logits=None)
    with pytest.raises(UserError, match="has no `logits`"):
        generate_ids(params, [1], model=regression, max_tokens=1)
    with pytest.raises(UserError, match="temperature = nan must be finite"):
        generate_ids(params, [1], max_tokens=1, temperature=float("nan"))
    with pytest.raises(UserError, match="max_tokens = 4611686018427387904 must be in"):
        generate_ids(params, [1], max_tokens=1 << 62)


def test_seed_decides_the_sample(params):
    def ids(seed: int) -> list[int]:
        return generate_ids(params, [1, 2], max_tokens=30, temperature=1.0, seed=seed)

    assert ids(3) == ids(3)
    assert ids(3) != ids(4)


def test_shorter_request_is_a_prefix(params):
    long = generate_ids(params, [7], max_tokens=20, seed=1)
    assert generate_ids(params, [7], max_tokens=5, seed=1) == long[:5]


def test_temperature_zero_ignores_the_seed_and_a_low_one_approaches_it(params):
    greedy = generate_ids(params, [5, 6], max_tokens=10, temperature=0, seed=1)
    assert greedy == generate_ids(params, [5, 6], max_tokens=10, temperature=0, seed=2)
    assert greedy == generate_ids(params, [5, 6], max_tokens=10, temperature=1e-4, seed=3)


def test_high_temperature_is_near_uniform(params):
    ids = generate_ids(params, [5], max_tokens=200, temperature=1e4)
    assert len(set(ids)) > 100  # of 200 uniform draws from 300 about 146 differ


def test_end_of_text_stops(params):
    free = generate_ids(params, [1, 2, 3], max_tokens=20, temperature=0)
    eos = free[6]
    stopped = generate_ids(params, [1, 2, 3], max_tokens=20, temperature=0, eos_id=eos)
    assert stopped == free[: free.index(eos) + 1]


def _together(params, requests, *, model=MODEL, max_rows=4, eos_id=None):
    """Ids of each request, decoded together in at most `max_rows` rows."""
    batch = generate_lib.Batch(model, params, max_rows=max_rows, seq_len=160, eos_id=eos_id)
    for number, request in enumerate(requests):
        batch.submit(number, request)
    found = [[] for _ in requests]
    while batch.busy:
        for number, ids, ended in batch.advance():
            found[number] += ids
            assert ended == (
                len(found[number]) == requests[number].max_tokens or eos_id in found[number]
            )
    return found


@pytest.mark.parametrize("cached", [True, False])
def test_prompts_together_give_what_each_gives_alone(params, cached):
    # More prompts than rows, of many lengths, four of which are read by one call: rows are filled
    # again while others are under way.
    model = MODEL if cached else dataclasses.replace(MODEL, decode=None)
    rng = np.random.default_rng(0)
    requests = [
        generate_lib.Request(
            rng.integers(1, 300, length).tolist(),
            max_tokens,
            Sampling(temperature=temperature, seed=length),
        )
        for length, max_tokens, temperature in (
            (3, 20, 0.0),
            (40, 1, 0.0),
            (9, 33, 1.0),
            (1, 7, 0.0),
            (130, 12, 0.7),
            (7, 25, 0.0),
            (2, 9, 1.3),
            (2, 2, 0.0),
            (20, 18, 0.0),
        )
    ]
    found = _together(params, requests, model=model, max_rows=6)
    for request, ids in zip(requests, found):
        settings = {"temperature": request.sampling.temperature, "seed": request.sampling.seed}
        alone = generate_ids(params, request.prompt_ids, max_tokens=request.max_tokens, **settings)
        assert ids == alone
    eos = found[0][5]
    stopped = _together(params, requests[:2], model=model, eos_id=eos)
    assert stopped[0] == found[0][: found[0].index(eos) + 1]


@pytest.mark.parametrize("reset", [-1, 7])
def test_a_cache_grows_and_shrinks_with_texts_in_the_middle(params, reset):
    config = dataclasses.replace(CONFIG, attention_reset=reset)
    model = base_model(config, seq_len=160)
    batch = generate_lib.Batch(model, params, max_rows=4, seq_len=160, eos_id=None)
    rng = np.random.default_rng(0)
    # (rounds before it comes, tokens of the prompt, tokens that it wants)
    asked = [(0, 100, 50), (0, 3, 9), (1, 40, 60), (2, 125, 20), (3, 10, 90), (9, 60, 8)]
    prompts = [rng.integers(1, 300, length).tolist() for _, length, _ in asked]
    for prompt in prompts:
        prompt[2::9] = [7] * len(prompt[2::9])
    found = [[] for _ in asked]
    for round_ in range(40):
        for number, (when, _, num) in enumerate(asked):
            if when == round_:
                request = generate_lib.Request(prompts[number], num, Sampling(temperature=0.0))
                batch.submit(number, request)
        for number, ids, _ in batch.advance():
            found[number] += ids
    assert not batch.busy
    for (_, _, num), prompt, ids in zip(asked, prompts, found):
        assert ids == _greedy(params, prompt, num, config)


def test_a_dropped_request_is_heard_of_no_more_and_leaves_its_row(params):
    batch = generate_lib.Batch(MODEL, params, max_rows=1, seq_len=160, eos_id=None)
    for number in range(3):
        batch.submit(number, generate_lib.Request([5 + number], 20, Sampling(temperature=0.0)))
    batch.start()
    batch.drop(0)  # under way
    assert batch.finish() == []
    batch.drop(1)  # waiting
    found = []
    while batch.busy:
        for number, ids, _ in batch.advance():
            assert number == 2
            found += ids
    assert found == generate_ids(params, [7], max_tokens=20, temperature=0)


def test_top_p_draws_from_the_likeliest(params):
    prompt = [5, 6]
    logits = jax.nn.softmax(MODEL.logits(params, np.array([prompt]))[0, -1])
    order = np.argsort(-logits)
    nucleus = set(order[: int(np.searchsorted(np.cumsum(logits[order]), 0.3)) + 1].tolist())
    assert 1 < len(nucleus) < 60

    def first(top_p: float, seed: int) -> int:
        sampling = Sampling(temperature=1.0, top_p=top_p, seed=seed)
        return _together(params, [generate_lib.Request(prompt, 1, sampling)])[0][0]

    assert {first(0.3, seed) for seed in range(40)} <= nucleus
    assert {first(1.0, seed) for seed in range(40)} - nucleus
    assert {first(1e-6, seed) for seed in range(10)} == {int(order[0])}
    # A row that asks for it does not change one that does not.
    free = generate_lib.Request(prompt, 10, Sampling(temperature=1.0, seed=7))
    narrow = generate_lib.Request(prompt, 10, Sampling(temperature=1.0, top_p=0.1, seed=7))
    both = _together(params, [free, narrow])
    assert both[0] == generate_ids(params, prompt, max_tokens=10, temperature=1.0, seed=7)
    assert both[1] != both[0]


class _Letters:
    """A tokenizer of bytes."""

    def decode(self, ids):
        return bytes(ids).decode("utf-8", "replace")


def _pieces(text: str, stop=(), size=1):
    stream, raw = generate_lib.Text(_Letters(), stop), text.encode()
    pieces = []
    for start in range(0, len(raw), size):
        pieces.append(stream.add(raw[start : start + size]))
        if stream.stopped:
            return pieces, True
    return [*pieces, stream.rest()], stream.stopped


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_text_comes_in_pieces_without_half_characters(size):
    text = "naïve 🍞 日本語 end"
    pieces, _ = _pieces(text, size=size)
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_text_that_ends_inside_a_character():
    stream = generate_lib.Text(_Letters())
    assert stream.add("a🍞".encode()[:3]) == ""
    assert stream.rest() == "a\ufffd"


@pytest.mark.parametrize("size", [1, 3, 100])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped"),
    [
        ("one\n\ntwo", ("\n\n",), "one", True),
        ("one\ntwo", ("\n\n",), "one\ntwo", False),
        ("abcabd", ("abd", "x"), "abc", True),
        ("aaab", ("aab",), "a", True),
        ("ends with a", ("ab",), "ends with a", False),
        ("first stop wins", ("wins", "stop"), "first ", True),
    ],
)
def test_stop_texts(text, stop, expected, stopped, size):
    pieces, ended = _pieces(text, stop, size)
    assert ("".join(pieces), ended) == (expected, stopped)


def test_settings_that_mean_nothing_are_refused(params):
    for request, message in (
        (generate_lib.Request([1], sampling=Sampling(top_p=0.0)), "top_p = 0.0 must be above 0"),
        (generate_lib.Request([1], sampling=Sampling(top_p=1.5)), "at most 1"),
        (generate_lib.Request([1], stop=("a", "")), "none of them empty"),
    ):
        with pytest.raises(UserError, match=message):
            generate_lib.check(request)


@pytest.mark.parametrize("num", [1, 2, 13])
def test_as_many_tokens_as_asked(params, num):
    assert len(generate_ids(params, [4], max_tokens=num)) == num


@pytest.fixture(scope="module")
def folder(tiny_run, tiny_text, tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("model") / "cooking"
    instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), out)
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

    loaded = Specialist.load(folder)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    ids = generate_lib.generate_ids(
        loaded.model,
        loaded.params,
        [tokenizer.eos_id, *tokenizer.encode("oven")],
        seq_len=32,
        max_tokens=9,
        temperature=0,
    )
    text = generate(folder, "oven", max_tokens=9, temperature=0, seed=0)
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    assert text == tokenizer.decode(ids[:end])


def test_a_stop_text_ends_it(folder):
    whole = generate(folder, "butter", max_tokens=20, temperature=0)
    stop = whole[5:8]
    cut = generate(folder, "butter", max_tokens=20, temperature=0, stop=(stop,))
    assert cut == whole[: whole.index(stop)]


def test_many_prompts_by_command(folder, tmp_path, capsys):
    prompts = ["butter", "", 'def "quoted" ü', *(f"wind {i}" for i in range(20))]
    lines = [json.dumps({"text": prompt}) for prompt in prompts if prompt]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    flags = [f"--model={folder}", f"--prompts={tmp_path}/prompts.jsonl", "--max_tokens=5"]
    assert main.run(["generate", *flags, "--temperature=0"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["prompt"] for line in found] == [prompt for prompt in prompts if prompt]
    for line in found[::4]:  # each opens the folder anew
        assert line["text"] == generate(folder, line["prompt"], max_tokens=5, temperature=0)
    assert main.run(["generate", *flags, "--prompt=x"]) == 2
    assert "one is meant" in capsys.readouterr().err
    assert main.run(["generate", *flags, "--top_p=0"]) == 2
    assert "top_p = 0.0 must be" in capsys.readouterr().err


def test_unknown_network_is_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "own")
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["model"]["kind"] = "mixer"
    del recipe["seal"]
    (tmp_path / "own" / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(UserError, match="unknown base network 'mixer'"):
        generate(tmp_path / "own", "x", max_tokens=1, temperature=0, seed=0)


def test_what_is_no_specialist_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"recipe\.json does not exist"):
        generate(tmp_path, "x", max_tokens=1, temperature=0, seed=0)
