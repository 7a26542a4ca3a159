"""The compiled step on eight devices: what it computes. What it moves: see contract_test.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import soup, tree
from soup_jax.data import loader
from soup_jax.errors import UserError
from soup_jax.soup import layout as sharding
from soup_jax.training import build
from soup_jax.training import state as train_state
from soup_jax.training import step as train_step

FREQUENCIES = np.full(6, 1 / 6)


@functools.cache
def compiled(num_devices, **fields):
    """(config, mesh, init, step): traced and compiled once for all tests of a process."""
    cfg = tiny_config(**fields)
    base_model = build.base_model(cfg)
    m = build.make_mesh(cfg, jax.devices()[:num_devices])
    config, optimizer = build.soup_config(cfg), build.optimizer_config(cfg)
    init = train_state.make_init(
        config, optimizer, base_model, seed=cfg.seed, frequencies_K=FREQUENCIES
    )
    shardings = train_state.state_shardings(m, jax.eval_shape(init), optimizer)
    step = train_step.compile_step(cfg, base_model, m, shardings)
    return cfg, m, jax.jit(init, out_shardings=shardings), step


def make(num_devices=8, **fields):
    cfg, m, init, step = compiled(num_devices, **fields)
    sums = jax.device_put(train_step.zero_metrics(6), sharding.replicated(m))
    return cfg, m, init(), step, sums


def make_batch(cfg, m, seed=0):
    rng = np.random.default_rng(seed)
    batch = soup.Batch(
        rows={
            "tokens": rng.integers(0, 400, (16, 33)).astype(np.int32),
            "num_targets": np.full(16, 32, np.int32),
        },
        domain_B=rng.integers(0, 6, 16).astype(np.int32),
        h_MK=rng.dirichlet(np.ones(6), cfg.num_mixtures).astype(np.float32),
    )
    return loader.to_device(batch, m)


def run(steps=3, **fields):
    cfg, m, state, step, sums = make(**fields)
    for i in range(steps):
        state, sums = step(state, sums, make_batch(cfg, m, i))
    return state, sums, step


@pytest.mark.parametrize("bank", ["merged", pytest.param("adamw", marks=pytest.mark.slow)])
def test_every_mesh_computes_the_same(bank):
    # Adam's first steps are sign-like: a rounding difference of a tiny gradient moves a weight by
    # the learning rate. A larger eps keeps the comparison about the layout.
    fields = {"optimizer.bank": bank, "optimizer.eps": 1e-3, "num_mixtures": 4}
    reference, sums, _ = run(num_devices=1, **fields)
    for num_devices, replica in ((2, 1), (8, 4)):
        state, other, _ = run(num_devices=num_devices, **fields, **{"mesh.replica": replica})
        np.testing.assert_allclose(other["loss"], sums["loss"], rtol=1e-5)
        for path, x in tree.flatten(reference.params).items():
            y = tree.flatten(state.params)[path]
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=path)


def test_gradient_accumulation_changes_nothing():
    fields = {"optimizer.eps": 1e-3, "num_devices": 2}
    one, one_sums, _ = run(**fields)
    two, two_sums, _ = run(**fields, **{"optimizer.grad_accumulation": 4})
    np.testing.assert_allclose(one_sums["domain_loss"], two_sums["domain_loss"], rtol=1e-4)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), one.params, two.params)


@pytest.mark.parametrize(
    ("remat", "num_mixtures", "replica"),
    [
        ("none", 1, 1),
        pytest.param("dots", 4, 2, marks=pytest.mark.slow),
        pytest.param("full", 4, 2, marks=pytest.mark.slow),
    ],
)
def test_gathering_layer_by_layer_computes_the_same(remat, num_mixtures, replica):
    fields = {"optimizer.eps": 1e-3, "num_mixtures": num_mixtures, "mesh.replica": replica}
    fields |= {"model.remat": remat, "model.num_layers": 3}
    once, once_sums, _ = run(**fields)
    layered, layered_sums, _ = run(**fields, **{"mesh.gather": "layer"})
    np.testing.assert_allclose(once_sums["loss"], layered_sums["loss"], rtol=1e-5)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), once.params, layered.params
    )


@pytest.mark.slow
def test_gathering_layer_by_layer_holds_one_layer_at_a_time():
    """Temporaries of a deep network grow by slices of the layers, not by whole layers."""
    fields = {"num_mixtures": 1, "model.dim": 128, "model.hidden_dim": 512, "batch_size": 16}
    temporaries = {}
    for gather in ("step", "layer"):
        for num_layers in (2, 10):
            cfg, m, state, step, sums = make(
                **fields, **{"mesh.gather": gather, "model.num_layers": num_layers}
            )
            compiled = step.lower(state, sums, make_batch(cfg, m)).compile()
            temporaries[gather, num_layers] = compiled.memory_analysis().temp_size_in_bytes
    layer = 4 * (4 * 128**2 + 3 * 128 * 512)
    grown = {g: temporaries[g, 10] - temporaries[g, 2] for g in ("step", "layer")}
    assert grown["step"] > 8 * layer  # weights and gradients whole
    assert grown["layer"] < grown["step"] - 8 * layer


def test_a_network_that_cannot_gather_its_layers_is_refused():
    cfg = tiny_config()
    network = dataclasses.replace(build.base_model(cfg), with_gather=None)
    batch = soup.Batch(rows={}, h_MK=jnp.ones((2, 6)) / 6)
    with pytest.raises(UserError, match="cannot gather its own layers"):
        soup.value_and_grad(
            {"router": {}},
            batch,
            model=network,
            config=soup.SoupConfig(num_domains=6, num_experts=0),
            gather="layer",
        )


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["merged", "adamw"])
def test_bfloat16_bank_and_moments_stay_close_to_float32(bank):
    fields = {"optimizer.bank": bank, "optimizer.eps": 1e-3, "num_experts": 20}
    exact, exact_sums, _ = run(steps=6, **fields)
    small = {"experts.dtype": "bfloat16", "optimizer.moment_dtype": "bfloat16"}
    stored, sums, _ = run(steps=6, **fields, **small)
    moments = jax.tree.leaves(stored.opt_state["bank"])
    assert {x.dtype for x in (*jax.tree.leaves(stored.params["bank"]), *moments)} == {
        jnp.dtype("bfloat16")
    }
    np.testing.assert_allclose(sums["loss"], exact_sums["loss"], rtol=2e-3)
    for path, x in tree.flatten(exact.params["bank"]).items():
        y = np.asarray(tree.flatten(stored.params["bank"])[path], np.float32)
        # Six roundings of 2^-8 each, with room; an update that did not arrive would be 1.
        error = np.abs(x - y).max() / np.abs(x).max()
        assert error < 0.1, path


def test_one_compilation_for_all_steps():
    assert run(steps=4)[2].jitted._cache_size() == 1


def test_state_keeps_its_storage_layout_and_the_bank_is_sliced_within_experts():
    state, _, _ = run()
    leaves = tree.flatten(state.params["bank"])
    sliced = 0
    for path, leaf in leaves.items():
        spec = leaf.sharding.spec
        assert not spec or spec[0] is None, f"{path} is split along the experts: {spec}"
        if leaf.addressable_shards[0].data.size * 8 == leaf.size:
            sliced += leaf.size
    assert sliced > 0.95 * tree.num_params(leaves)


def test_metrics_sum_over_steps_and_domains():
    cfg, m, state, step, sums = make()
    batches = [make_batch(cfg, m, i) for i in range(3)]
    for batch in batches:
        state, sums = step(state, sums, batch)
    counts = sum(np.bincount(np.asarray(b.domain_B), minlength=6) for b in batches)
    np.testing.assert_array_equal(sums["domain_rows"], counts)
    np.testing.assert_array_equal(sums["domain_targets"], 32 * counts)
    assert float(sums["steps"]) == 3
    assert int(state.step) == 3
    np.testing.assert_allclose(
        sums["domain_loss"].sum() / sums["domain_targets"].sum(), sums["loss"] / 3, rtol=1e-5
    )


def test_a_step_that_is_not_finite_changes_nothing_and_is_remembered():
    cfg, m, state, step, sums = make()
    state, sums = step(state, sums, make_batch(cfg, m, 0))
    params = jax.tree.map(np.asarray, state.params)
    nan_MK = jax.device_put(jnp.full((2, 6), jnp.nan), sharding.replicated(m))
    bad = dataclasses.replace(make_batch(cfg, m, 1), h_MK=nan_MK)
    state, sums = step(state, sums, bad)
    state, sums = step(state, sums, make_batch(cfg, m, 2))
    assert int(state.bad_step) == 1
    assert int(state.step) == 1
    jax.tree.map(np.testing.assert_array_equal, params, jax.tree.map(np.asarray, state.params))
