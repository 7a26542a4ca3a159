"""Scores equal sums of log-likelihoods of tokens, whatever the windows and batches."""

import json
import math

import jax
import numpy as np
import pytest

from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.evaluation import score
from soup_jax.models.llama import LlamaConfig, base_model
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.open import load
from soup_jax.specialists.specialist import Specialist

SEQ_LEN = 24
MODEL = base_model(
    LlamaConfig(vocab_size=64, num_layers=1, dim=16, num_heads=2, num_kv_heads=1, hidden_dim=24),
    seq_len=SEQ_LEN,
)


@pytest.fixture(scope="module")
def params():
    leaves, structure = jax.tree.flatten(MODEL.init(jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noisy = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, noisy)


def _one_by_one(params, ids: list[int], scored: int) -> tuple[float, bool]:
    """By the plain network, a token at a time, with the context that the definition gives."""
    ids = ids[-(SEQ_LEN + 1) :]
    log_p = jax.nn.log_softmax(jax.jit(MODEL.logits)(params, np.array([ids[:-1]]))[0])
    targets = ids[1:]
    rows = range(len(targets) - scored, len(targets))
    return (
        sum(float(log_p[i, targets[i]]) for i in rows),
        all(int(log_p[i].argmax()) == targets[i] for i in rows),
    )


def test_targets_of_many_lengths(params):
    rng = np.random.default_rng(0)
    pairs = [
        (rng.integers(1, 64, length).tolist(), scored)
        for length, scored in ((2, 1), (5, 4), (17, 3), (18, 17), (25, 24), (25, 1), (60, 9))
    ]
    pairs += [(rng.integers(1, 64, 12).tolist(), 2) for _ in range(40)]  # several batches
    found = {i: (v, g) for i, v, g in score.score_targets(MODEL, params, pairs, seq_len=SEQ_LEN)}
    assert sorted(found) == list(range(len(pairs)))
    for index, (ids, scored) in enumerate(pairs):
        value, likeliest = _one_by_one(params, ids, scored)
        assert found[index][0] == pytest.approx(value, abs=1e-4)
        assert found[index][1] == likeliest


def test_the_likeliest_tokens_are_known_as_such(params):
    ids, logits = [3, 4], jax.jit(MODEL.logits)
    for _ in range(5):  # of one shape: what comes later moves nothing
        padded = np.pad(ids, (0, SEQ_LEN - len(ids)))[None]
        ids.append(int(logits(params, padded)[0, len(ids) - 1].argmax()))
    other = [*ids[:-1], (ids[-1] + 1) % 64]
    pairs = [(ids, 5), (other, 5)]
    found = {i: g for i, _, g in score.score_targets(MODEL, params, pairs, seq_len=SEQ_LEN)}
    assert found == {0: True, 1: False}


@pytest.mark.parametrize("length", [0, 1, 23, 24, 25, 47, 48, 50])
def test_windows_score_every_token_once_with_all_context(length):
    ids = list(range(1, length + 1))
    seen = []
    for window, scored in score.windows(ids, eos_id=0, seq_len=SEQ_LEN):
        assert 1 < len(window) <= SEQ_LEN + 1
        # The definition: all windows but a text's first have full context.
        assert len(window) == SEQ_LEN + 1 or window[0] == 0
        seen += window[len(window) - scored :]
    assert seen == ids


def test_what_cannot_be_scored_is_refused(params):
    for pair in (([1], 1), ([1, 2], 0), (list(range(40)), 30)):
        with pytest.raises(UserError, match="cannot be scored"):
            list(score.score_targets(MODEL, params, [pair], seq_len=SEQ_LEN))


@pytest.fixture(scope="module")
def specialist(tiny_run, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("scored") / "cooking"
    instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), out)
    return out


def test_documents_by_command(specialist, tiny_run, tiny_text, tmp_path, capsys):
    flags = [f"--documents={tiny_text}/cooking.jsonl", f"--json={tmp_path}/scores.json"]
    assert main.run(["score", f"--model={specialist}", f"--run={tiny_run}", *flags]) == 0
    out = capsys.readouterr().out
    assert "all 30 documents" in out
    assert "10 more documents" in out
    numbers = json.loads((tmp_path / "scores.json").read_text())
    lines = (tiny_text / "cooking.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    loaded = Specialist.load(specialist)
    ids = [loaded.recipe["eos_id"], *loaded.tokenizer.encode(texts[0])]
    assert len(ids) > 33  # longer than a window
    first = numbers["documents"][0]["cooking"]
    assert first["tokens"] == len(ids) - 1
    assert first["bytes"] == len(texts[0].encode())
    by_hand, start = 0.0, 0
    while start < len(ids) - 1:
        end = min(start + 32, len(ids) - 1)
        window = ids[max(end - 32, 0) : end + 1]
        log_p = jax.nn.log_softmax(loaded.model.logits(loaded.params, np.array([window[:-1]]))[0])
        at = np.arange(len(window) - 1)[-(end - start) :]
        by_hand -= float(log_p[at, np.array(window)[at + 1]].sum())
        start = end
    assert first["loss"] == pytest.approx(by_hand / (len(ids) - 1), rel=1e-5)
    total = numbers["total"]["cooking"]
    rows = [row["cooking"] for row in numbers["documents"]]
    nats = sum(row["loss"] * row["tokens"] for row in rows)
    assert total["loss"] == pytest.approx(nats / sum(row["tokens"] for row in rows))
    bits = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert total["bits_per_byte"] == pytest.approx(bits)
    generic = load(tiny_run).generic().score(texts)
    assert numbers["total"]["generic_h"]["loss"] == pytest.approx(score.total(generic).loss)
    assert numbers["total"]["generic_h"]["loss"] != total["loss"]


def test_mistakes_by_command(specialist, tmp_path, capsys):
    assert main.run(["score", f"--model={specialist}"]) == 2
    assert "are required" in capsys.readouterr().err
    flags = [f"--model={specialist}", f"--model={specialist}", f"--documents={tmp_path}"]
    assert main.run(["score", *flags]) == 2
    assert "not all different" in capsys.readouterr().err


def test_a_text_without_tokens_has_no_loss(specialist):
    (empty,) = Specialist.load(specialist).score([""])
    assert empty.num_tokens == empty.num_bytes == 0
    assert math.isnan(empty.loss)
    assert math.isnan(empty.bits_per_byte)
