import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax import soup, tree
from soup_jax.data import loader
from soup_jax.experiments import base
from soup_jax.soup import merge
from soup_jax.training import build

K, E, M, B, L = 10, 6, 4, 16, 12
FREQUENCIES = np.full(K, 1 / K)


def make_config(**fields):
    cfg = base.get_config()
    cfg.update_from_flattened_dict(
        {
            "num_domains": K,
            "num_experts": E,
            "num_mixtures": M,
            "batch_size": B,
            "seq_len": L,
            "vocab_size": 300,
            "model.dim": 32,
            "model.hidden_dim": 64,
            "experts.init_scale": 0.3,
        }
        | fields
    )
    return cfg


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return soup.Batch(
        rows={
            "tokens": jnp.asarray(rng.integers(0, 300, (B, L + 1)), jnp.int32),
            "num_targets": jnp.asarray(rng.integers(1, L + 1, B), jnp.int32),
        },
        h_MK=jnp.asarray(rng.dirichlet(np.full(K, 0.3), M), jnp.float32),
        domain_B=jnp.asarray(rng.integers(0, K, B), jnp.int32),
    )


@functools.cache
def init(**fields):
    """(network, settings, parameters) of a config: the same objects, so that jit knows them."""
    cfg = make_config(**fields)
    base_model = build.base_model(cfg)
    config = build.soup_config(cfg)
    make = functools.partial(
        soup.init, init_base=base_model.init, config=config, frequencies_K=FREQUENCIES
    )
    return base_model, config, jax.jit(make)(jax.random.key(0))


value_and_grad = jax.jit(
    soup.value_and_grad, static_argnames=("model", "config", "mesh", "num_micro", "gather")
)


@functools.partial(jax.jit, static_argnums=(2, 3))
def plain_loss(params, batch, base_model, config):
    """The definition: merge each mixture, average the loss over all targets."""
    alpha = soup.coefficients(params, batch.h_MK, config)

    def of_mixture(alpha_E, rows):
        theta = merge.merge(params["shared"], params["bank"], alpha_E)
        losses, weights = base_model.example_losses(theta, rows)
        return (losses * weights).sum(), weights.sum()

    alpha = jnp.broadcast_to(alpha, (M, alpha.shape[1]))
    rows = {k: v.reshape(M, B // M, *v.shape[1:]) for k, v in batch.rows.items()}
    total, weight = jax.lax.map(lambda x: of_mixture(*x), (alpha, rows))
    return total.sum() / weight.sum()


def assert_close(a, b, tolerance=2e-5):
    a, b = jax.device_get((a, b))  # eager jax would compile for each shape
    for path, x in tree.flatten(a).items():
        y = tree.flatten(b)[path]
        scale = max(float(abs(x).max()), 1e-6)
        np.testing.assert_allclose(x / scale, y / scale, atol=tolerance, err_msg=path)


@pytest.mark.parametrize(("num_micro", "normalization"), [(1, "ball"), (2, "softmax")])
def test_factored_gradients_are_those_of_the_plain_loss(batch, num_micro, normalization):
    base_model, config, params = init(**{"router.normalization": normalization})
    loss, expected = jax.value_and_grad(plain_loss)(params, batch, base_model, config)
    (ours, _), grads = value_and_grad(
        params, batch, model=base_model, config=config, num_micro=num_micro
    )
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    assert_close(expected["shared"], grads.shared)
    assert_close(expected["router"], grads.router)
    bank = jax.tree.map(lambda g: jnp.einsum("ME,M...->E...", grads.alpha_ME, g), grads.merged)
    assert_close(expected["bank"], {"dense": bank})
    norms = soup.squared_norms(grads, params["bank"])
    for part in ("shared", "router", "bank"):
        direct = sum(jnp.sum(x**2) for x in jax.tree.leaves(expected[part]))
        np.testing.assert_allclose(norms[part], direct, rtol=1e-3)


@pytest.mark.slow
def test_gradients_on_a_mesh_equal_those_on_one_device(batch):
    cfg = make_config()
    base_model, config, params = init()
    (loss, _), expected = value_and_grad(params, batch, model=base_model, config=config)
    for replica in (1, 2):
        cfg.mesh.replica = replica
        m = build.make_mesh(cfg, jax.devices()[:4])
        on_mesh = loader.to_device(batch, m)
        (ours, _), grads = value_and_grad(params, on_mesh, model=base_model, config=config, mesh=m)
        np.testing.assert_allclose(ours, loss, rtol=1e-5)
        assert_close(expected._asdict(), grads._asdict())


def test_zero_experts_is_the_generic_model(batch):
    base_model, config, params = init(num_experts=0)
    assert params["bank"] == {}
    assert params["router"] == {}
    losses, weights = base_model.example_losses(params["shared"], batch.rows)
    (ours, _), grads = value_and_grad(params, batch, model=base_model, config=config)
    np.testing.assert_allclose(ours, (losses * weights).sum() / weights.sum(), rtol=1e-6)
    theta, alpha = soup.specialist(params, batch.h_MK[0], config)
    assert alpha.shape == (0,)
    assert_close(theta, params["shared"], 0)
    plain = jax.grad(lambda p: plain_loss({**params, "shared": p}, batch, base_model, config))
    assert_close(plain(params["shared"]), grads.shared)


def test_the_shared_init_does_not_depend_on_the_number_of_experts():
    _, _, with_experts = init()
    _, _, without = init(num_experts=0)
    assert_close(with_experts["shared"], without["shared"], 0)


def test_the_mean_is_weighted_however_small_the_weights(batch):
    base_model, config, params = init()

    def scaled(params, rows):
        losses, weights = base_model.example_losses(params, rows)
        return losses, 1e-4 * weights

    small = dataclasses.replace(base_model, example_losses=scaled)
    found, wanted = (
        value_and_grad(params, batch, model=m, config=config) for m in (small, base_model)
    )
    np.testing.assert_allclose(found[0][0], wanted[0][0], rtol=1e-5)
    assert_close(found[1].shared, wanted[1].shared)
    nothing = jnp.zeros_like(batch.rows["num_targets"])
    empty = dataclasses.replace(batch, rows={**batch.rows, "num_targets": nothing})
    (loss, _), grads = value_and_grad(params, empty, model=base_model, config=config)
    assert loss == 0
    assert not any(g.any() for g in jax.tree.leaves(grads.merged))


def test_the_norm_of_gradients_that_cancel_is_not_below_zero():
    for seed in range(30):
        g = normal(2, 6, 5, seed=seed)
        merged = {"w": jnp.concatenate([g, -(g[:1] + g[1:])])}
        alpha_ME = jnp.repeat(normal(1, E, seed=seed), 3, 0)
        shared = {"w": merged["w"].sum(0)}
        grads = soup.SoupGrads(shared, {}, merged, alpha_ME, {})
        norms = soup.squared_norms(grads, {"dense": {"w": jnp.zeros((E, 6, 5))}})
        assert 0 <= norms["bank"] < 1e-9


def normal(*shape, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_row_stats_are_those_of_their_rows(batch):
    base_model, config, params = init()
    for num_micro in (1, 2):
        (loss, (row_loss, row_weight)), _ = value_and_grad(
            params, batch, model=base_model, config=config, num_micro=num_micro
        )
        np.testing.assert_array_equal(row_weight, batch.rows["num_targets"])
        np.testing.assert_allclose(row_loss.sum() / row_weight.sum(), loss, rtol=1e-5)


def test_specialist_is_the_merge_at_the_routed_coefficients(batch):
    _, config, params = init()
    h = np.asarray(batch.h_MK[2])
    theta, alpha = soup.specialist(params, h, config)
    np.testing.assert_allclose(alpha, soup.coefficients(params, batch.h_MK, config)[2], rtol=1e-5)
    assert_close(merge.merge(params["shared"], params["bank"], alpha), theta, 0)
