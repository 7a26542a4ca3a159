"""Networks that are not ours go through every command, named by a dotted path and nothing else."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

import soup_jax
from soup_jax import tree
from soup_jax.cli import main
from soup_jax.config import schema
from soup_jax.training import build

NETS = pathlib.Path(__file__).with_name("foreign_nets.py")
MODELS = {
    "linen": {"model.kind": "my_nets:linen", "model.args": (("num_blocks", 2),)},
    # Sizes that the Llama would refuse.
    "nnx": {"model.kind": "my_nets:nnx_model", "model.dim": 30, "model.num_heads": 7},
}


@pytest.fixture
def here(tmp_path, monkeypatch) -> pathlib.Path:
    """The current folder, in which my_nets.py lies."""
    shutil.copyfile(NETS, tmp_path / "my_nets.py")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # a console script adds it by itself
    monkeypatch.delitem(__import__("sys").modules, "my_nets", raising=False)
    return tmp_path


def _write_config(folder: pathlib.Path, corpus: str, **fields) -> str:
    flat = dict(schema.flat_items(tiny_config(**{"corpus.dir": corpus, "num_steps": 6} | fields)))
    (folder / "mine.py").write_text(
        "from soup_jax.experiments import base\n"
        "def get_config():\n"
        "    cfg = base.get_config()\n"
        f"    cfg.update_from_flattened_dict({flat!r})\n"
        "    return cfg\n"
    )
    return "--config=mine.py"


@pytest.mark.parametrize("name", MODELS)
def test_every_command(name, here, tiny_corpus, tiny_text, capsys):
    config = _write_config(here, tiny_corpus, **MODELS[name])
    documents = str(tiny_text / "cooking.jsonl")
    assert main.run(["train", config, "--workdir=run"]) == 0
    assert "trained: run" in capsys.readouterr().out

    words = ["evaluate", "--workdir=run", f"--specialists={documents}", "--max_windows=2"]
    assert main.run(words) == 0
    result = json.loads((here / "run" / "evaluation.json").read_text())
    assert 0 < result["average"]["specialist"]["loss"] < 1.5 * np.log(400)

    assert main.run(["instantiate", "--run=run", f"--documents={documents}", "--out=made"]) == 0
    recipe = json.loads((here / "made" / "recipe.json").read_text())
    assert recipe["model"]["kind"] == MODELS[name]["model.kind"]
    capsys.readouterr()

    words = ["generate", "--model=made", "--prompt=butter", "--max_tokens=40"]  # beyond seq_len
    assert main.run(words) == 0
    first = capsys.readouterr().out
    assert len(first) > len("butter\n")
    assert main.run(words) == 0
    assert capsys.readouterr().out == first


@pytest.mark.parametrize("name", MODELS)
def test_its_logits_are_causal_and_give_its_losses(name, here):
    model = build.base_model(tiny_config(**MODELS[name]))
    params = model.init(jax.random.key(0))
    assert all(isinstance(path, str) for path in tree.flatten(params))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 400, (2, 33)), jnp.int32)
    logits = model.logits(params, tokens[:, :-1])
    assert logits.shape == (2, 32, 400)
    np.testing.assert_allclose(model.logits(params, tokens[:, :9]), logits[:, :9], atol=1e-4)

    rows = {"tokens": tokens, "num_targets": jnp.array([32, 5])}
    losses, weights = model.example_losses(params, rows)
    np.testing.assert_array_equal(weights.sum(1), [32, 5])
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    expected = -np.log(np.take_along_axis(probabilities, np.asarray(tokens)[:, 1:, None], 2))
    np.testing.assert_allclose(losses, expected[..., 0], rtol=1e-4)


def test_its_arguments_reach_it(here):
    shapes = [
        jax.eval_shape(
            build.base_model(
                tiny_config(**{"model.kind": "my_nets:linen", "model.args": (("num_blocks", n),)})
            ).init,
            jax.random.key(0),
        )
        for n in (1, 3)
    ]
    assert "Block_2" not in shapes[0]
    assert "Block_2" in shapes[1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model.kind": "my_nets:transformer"}, "has no attribute transformer"),
        ({"model.kind": "my_net:linen"}, "no module my_net"),
        ({"model.kind": "my_nets:nothing"}, "returned a Transformer, and must return a BaseModel"),
        ({"mesh.gather": "layer", **MODELS["nnx"]}, "cannot gather its own layers"),
    ],
)
def test_mistakes_are_one_line_before_work(fields, message, here, tiny_corpus, capsys):
    assert main.run(["train", _write_config(here, tiny_corpus, **fields), "--workdir=run"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error
    assert not (here / "run").exists()


def test_losses_of_its_own_give_no_logits():
    def losses(apply, rows):
        return apply(rows["x"]), jnp.ones(2)

    import flax.linen as nn

    model = soup_jax.from_linen(nn.Dense(1), example=jnp.zeros((1, 2)), losses=losses)
    assert model.logits is None
