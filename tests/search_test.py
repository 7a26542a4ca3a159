"""Searched coefficients: their gradients are right, and they are taken only where they help."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax import tree
from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.soup import bank as bank_lib
from soup_jax.soup.merge import merge
from soup_jax.specialists import search as search_lib
from soup_jax.specialists import stored
from soup_jax.specialists.specialist import Specialist


class _Arrays:
    """Arrays of a bank with both kinds of experts."""

    where, checksums = "memory", {}

    def __init__(self, params):
        self._leaves = {n: np.asarray(x) for n, x in tree.flatten(params).items()}
        self.shapes = {n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in self._leaves.items()}

    def rows(self, name):
        return 1

    def read(self, name, start=0, stop=None):
        return self._leaves[name][start:stop]


def _params():
    shared = {
        "embedding": jax.random.normal(jax.random.key(0), (30, 8)),
        "layers": {"w": jax.random.normal(jax.random.key(1), (2, 8, 6)), "b": jnp.ones(6)},
    }
    rules = (("embedding", "dense"), (".*/w", "low_rank:2"), (".*", "none"))
    bank = bank_lib.init_bank(jax.random.key(2), shared, num_experts=5, rules=rules, init_scale=0.5)
    return {"shared": shared, "bank": bank, "router": {}}


def _loss(theta):
    return sum(jnp.sum(jnp.sin(x * (i + 1))) for i, x in enumerate(jax.tree.leaves(theta)))


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_gradients_of_coefficients_are_those_of_the_merge(block_bytes, monkeypatch):
    monkeypatch.setattr(stored, "BLOCK_BYTES", block_bytes)
    params = _params()
    alpha_ME = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)

    @jax.jit
    def expected(alpha_E):
        return jax.grad(lambda a: _loss(merge(params["shared"], params["bank"], a)))(alpha_E)

    arrays = _Arrays(params)
    merged = stored.merge(arrays, alpha_ME)
    found = stored.project(arrays, [jax.device_get(jax.grad(_loss)(theta)) for theta in merged])
    np.testing.assert_allclose(found, [expected(a) for a in alpha_ME], rtol=2e-4, atol=2e-4)


def _uniform(num):
    return np.full((num, 6), 1 / 6)


@pytest.mark.parametrize("over", ["alpha", pytest.param("h", marks=pytest.mark.slow)])
def test_it_helps_on_documents_that_were_held_back(over, trained, texts, monkeypatch):
    monkeypatch.setattr(search_lib, "STEPS", 12)
    found = search_lib.search(trained, [texts[:12], texts[12:24]], _uniform(2), over=over)
    for result in found:
        assert result.steps > 0
        assert result.loss < result.start_loss - 0.01
        same_E = trained.coefficients(result.h_K[None])[0]
        assert np.array_equal(same_E, result.alpha_E) == (over == "h")
    # Other documents, which it never saw: the coefficients and not the search are what helps.
    theta_start, theta = stored.merge(
        trained.arrays, np.stack([trained.coefficients(_uniform(1))[0], found[0].alpha_E])
    )
    unseen = search_lib.pack(
        trained.map.tokenizer(), texts[24:], eos_id=trained.map.eos_id, seq_len=32, max_windows=0
    )
    losses = [search_lib.mean_loss(trained.model, t, unseen) for t in (theta_start, theta)]
    assert losses[1] < losses[0] - 0.005
    # Alone, and with a bank that is read from disk each time, the same comes.
    monkeypatch.setattr(stored, "HELD_BYTES", 0)
    (same,) = search_lib.search(trained, [texts[12:24]], _uniform(1), over=over)
    assert same.steps == found[1].steps
    np.testing.assert_allclose(same.alpha_E, found[1].alpha_E, rtol=1e-3, atol=1e-4)


def test_what_does_not_help_is_not_taken(trained, texts, monkeypatch):
    monkeypatch.setattr(search_lib, "STEPS", 4)
    monkeypatch.setattr(search_lib, "LEARNING_RATE", -0.5)  # up the loss
    h_MK = trained.map.domain_frequencies[None]
    (found,) = search_lib.search(trained, [texts[:9]], h_MK)
    assert found.steps == 0
    assert found.loss == found.start_loss
    np.testing.assert_array_equal(found.alpha_E, trained.coefficients(h_MK)[0])


@pytest.mark.parametrize(("certain", "best"), [(True, 6), (False, 3)])
def test_the_surest_gain_is_taken_and_not_the_largest(certain, best):
    """At step 3 every window gains 0.1 nats a token; at 6 more on average, with luck or without."""
    windows = search_lib.TokenSet(np.zeros((4, 9), np.int32), np.full(4, 8, np.int32), 0)
    folds = [search_lib._Fold(windows, windows)] * 3
    large = [0.2] * 4 if certain else [0.9, 0.1, -0.1, -0.1]
    curve = [
        (step, np.full((3, 2), step), [40.0 - 8 * np.array(gain)] * 3)
        for step, gain in ((0, [0.0] * 4), (3, [0.1] * 4), (6, large), (9, [-0.1] * 4))
    ]
    step, at, losses = search_lib._best(curve, np.array([True, False, True]), folds)
    assert step == best
    np.testing.assert_array_equal(at, np.full((2, 2), best))
    assert losses == pytest.approx((5.0, 5.0 - np.mean({3: [0.1] * 4, 6: large}[best])))
    worse = [curve[0], curve[3]]
    assert search_lib._best(worse, np.array([True] * 3), folds)[0] == 0


def test_one_document_cannot_be_held_back(trained, texts):
    h_MK = _uniform(1)
    (found,) = search_lib.search(trained, [texts[:1]], h_MK)
    assert found.steps == 0
    assert np.isnan(found.loss)
    np.testing.assert_array_equal(found.alpha_E, trained.coefficients(h_MK)[0])


def test_by_command_and_from_its_recipe_again(trained, tiny_text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(search_lib, "STEPS", 6)
    flags = [f"--run={trained.workdir}", f"--documents={tiny_text}/cooking.jsonl"]
    assert main.run(["instantiate", *flags, f"--out={tmp_path}/s", "--method=search"]) == 0
    assert "documents held back:" in capsys.readouterr().out
    made = Specialist.load(tmp_path / "s")
    # It is the default, unless each step would read the soup from disk.
    assert main.run(["instantiate", *flags, f"--out={tmp_path}/default"]) == 0
    assert "searching holds about" in capsys.readouterr().out
    default = Specialist.load(tmp_path / "default")
    np.testing.assert_array_equal(default.alpha_E, made.alpha_E)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "HELD_BYTES", 100)
        assert main.run(["instantiate", *flags, f"--out={tmp_path}/large"]) == 0
    assert "is not searched in, unless the method says so" in capsys.readouterr().out
    large = Specialist.load(tmp_path / "large")
    np.testing.assert_allclose(large.alpha_E, trained.coefficients(large.h_K[None])[0], rtol=1e-6)
    assert made.recipe["search"]["steps"] > 0
    assert not np.allclose(made.alpha_E, trained.coefficients(made.h_K[None])[0])
    (again,) = trained.make(made.h_K[None], made.alpha_E[None])
    jax.tree.map(np.testing.assert_array_equal, made.params, again.params)
    assert main.run(["instantiate", *flags, f"--out={tmp_path}/h", "--method=search_h"]) == 0
    weights = Specialist.load(tmp_path / "h")
    assert weights.recipe["search"]["steps"] > 0
    assert not np.allclose(weights.h_K, made.h_K)
    np.testing.assert_allclose(weights.alpha_E, trained.coefficients(weights.h_K[None])[0])
    with pytest.raises(UserError, match="method 'magic' is none of auto, histogram, search"):
        trained.instantiate(["butter"], method="magic")
