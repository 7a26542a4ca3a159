import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.soup import router

K, E = 12, 5
FREQUENCIES = np.random.default_rng(0).dirichlet(np.ones(K))
CENTROIDS = np.random.default_rng(1).normal(size=(K, 8)).astype(np.float32)


def params(**changes):
    options = {
        "num_domains": K,
        "num_experts": E,
        "hidden_dim": 16,
        "frequencies_K": FREQUENCIES,
    }
    return router.init_router(jax.random.key(0), **(options | changes))


def route(p, h, normalization="none", scale=1.0, center=True):
    return router.route(p, jnp.asarray(h), normalization=normalization, scale=scale, center=center)


@pytest.fixture(scope="module")
def h_MK():
    return np.random.default_rng(2).dirichlet(np.full(K, 0.2), size=64)


@pytest.mark.parametrize("normalization", router.NORMALIZATIONS)
def test_normalizations_do_what_they_say(normalization, h_MK):
    alpha = np.asarray(route(params(), h_MK, normalization, scale=2.0)) / 2.0
    if normalization == "softmax":
        assert (alpha > 0).all()
        np.testing.assert_allclose(alpha.sum(1), 1, rtol=1e-5)
        return
    assert (alpha < 0).any()
    assert (alpha > 0).any()
    length = np.linalg.norm(alpha, axis=1)
    if normalization == "tanh":
        assert (abs(alpha) < 1).all()
    if normalization == "l2":
        np.testing.assert_allclose(length, 1, rtol=1e-4)
    if normalization == "ball":
        assert (length <= 1 + 1e-5).all()
        z = np.asarray(route(params(), h_MK))
        inside = np.linalg.norm(z, axis=1) < 1
        np.testing.assert_allclose(alpha[inside], z[inside], rtol=1e-6)


def test_unknown_normalization_is_refused():
    with pytest.raises(ValueError, match="'sofmax' is none of"):
        router.normalize(jnp.ones((1, 2)), "sofmax")


def test_centered_router_gives_nothing_at_the_generic_h():
    np.testing.assert_allclose(route(params(), FREQUENCIES[None]), 0, atol=1e-6)
    assert abs(route(params(), FREQUENCIES[None], center=False)).max() > 1e-2


@pytest.mark.parametrize("normalization", router.NORMALIZATIONS)
def test_gradient_is_finite_at_the_generic_h(normalization):
    f = lambda p: (route(p, FREQUENCIES[None], normalization) ** 2).sum()  # noqa: E731
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(jax.grad(f)(params())))


def test_frequencies_are_not_trained(h_MK):
    g = jax.grad(lambda p: route(p, h_MK).sum())(params())
    assert (g["frequencies"] == 0).all()
    assert abs(g["linear"]).max() > 0


def test_hidden_layer_starts_silent_and_can_learn(h_MK):
    with_mlp, linear = params(), params(hidden_dim=0)
    np.testing.assert_array_equal(route(with_mlp, h_MK), route(linear, h_MK))
    g = jax.grad(lambda p: route(p, h_MK)[:, 0].sum())(with_mlp)
    assert abs(g["out"]).max() > 0


def test_centroid_init_orders_mixtures_by_their_mean_embedding():
    p = params(centroids_KC=CENTROIDS, num_experts=8)
    alpha = np.asarray(route(p, np.eye(K)))
    # With as many experts as directions, the projection is an invertible map of the embedding.
    centered = CENTROIDS - FREQUENCIES @ CENTROIDS
    back = np.linalg.lstsq(alpha, centered, rcond=None)[0]
    np.testing.assert_allclose(alpha @ back, centered, atol=1e-3)


def test_centroid_init_uses_all_experts_alike():
    for num_experts in (3, 8, 40):
        linear = router.centroid_projection(CENTROIDS, FREQUENCIES, num_experts)
        assert linear.shape == (K, num_experts)
        variance = FREQUENCIES @ linear**2
        np.testing.assert_allclose(variance.mean(), 1, rtol=0.5)
        assert variance.min() > 0.1
