"""Fine-tuning: better on documents that were held back, and an ordinary specialist in the end."""

import jax
import numpy as np
import pytest

from soup_jax import tree
from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.specialists.finetune import finetune
from soup_jax.specialists.instantiate import instantiate_to
from soup_jax.specialists.specialist import Specialist


@pytest.fixture(scope="module")
def specialist(tiny_run, tiny_text, tmp_path_factory):
    out = tmp_path_factory.mktemp("start") / "cooking"
    instantiate_to(tiny_run, str(tiny_text / "cooking.jsonl"), out)
    return Specialist.load(out)


@pytest.mark.parametrize("rank", [0, 2])
def test_documents_held_back_get_better(specialist, texts, rank):
    rate = 0.05 if rank else 0.01
    made = finetune(specialist, texts, learning_rate=rate, max_steps=30, rank=rank)
    found = made.recipe["finetuned"]
    assert 0 < found["steps"] <= 30
    assert found["loss"] < found["start_loss"] - 0.05
    again = finetune(specialist, texts, learning_rate=rate, max_steps=30, rank=rank)
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    before, after = (tree.flatten(s.params) for s in (specialist, made))
    changed = {path for path in before if (before[path] != after[path]).any()}
    if rank:
        assert changed
        for path in changed:
            difference = (after[path] - before[path]).reshape(-1, *before[path].shape[-2:])
            for matrix in difference:
                assert np.linalg.matrix_rank(matrix, tol=1e-5) <= rank
        assert not any(path.startswith("embedding") or "norm" in path for path in changed)
    else:
        assert changed == set(before)


def test_a_rate_that_only_harms_changes_nothing(specialist, texts):
    start = finetune(specialist, texts, learning_rate=0.01, max_steps=100)
    made = finetune(start, texts[:3], learning_rate=0.9, max_steps=20)
    assert made.recipe["finetuned"]["steps"] == 0
    jax.tree.map(np.testing.assert_array_equal, made.params, start.params)


def test_it_ends_when_it_gets_no_better(specialist, texts):
    said = []
    finetune(specialist, texts[:4], learning_rate=0.05, max_steps=1000, say=said.append)
    assert len(said) < 50


def test_by_command(specialist, tiny_run, tiny_text, tmp_path, capsys):
    flags = [f"--documents={tiny_text}/cooking.jsonl", "--learning_rate=0.01", "--max_steps=10"]
    model = f"--model={specialist.tokenizer_path.parent}"
    assert main.run(["finetune", model, *flags, f"--out={tmp_path}/a"]) == 0
    assert "documents held back:" in capsys.readouterr().out
    made = Specialist.load(tmp_path / "a")
    assert made.recipe["finetuned"]["steps"] == 10
    assert made.generate("butter", max_tokens=5)
    made.save(tmp_path / "hf", format="hf")
    assert main.run(["finetune", f"--run={tiny_run}", *flags, f"--out={tmp_path}/b"]) == 0
    assert main.run(["finetune", model, f"--run={tiny_run}", *flags, f"--out={tmp_path}/c"]) == 2
    assert "and not both" in capsys.readouterr().err
    assert main.run(["finetune", model, *flags]) == 2
    assert "--out is required" in capsys.readouterr().err


def test_mistakes_are_refused(specialist, texts):
    for settings, message in (
        ({"learning_rate": 0.0}, "must be between 0 and 1"),
        ({"max_steps": 0}, "must be above 0"),
        ({"rank": -1}, "must be at least 0"),
    ):
        with pytest.raises(UserError, match=message):
            finetune(specialist, texts, **settings)
    with pytest.raises(UserError, match="at least two documents"):
        finetune(specialist, texts[:1])
