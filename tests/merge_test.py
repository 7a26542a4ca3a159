import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.soup import merge

E, M = 5, 3


@pytest.fixture(scope="module")
def soup():
    key = jax.random.split(jax.random.key(0), 4)
    shared = {
        "a": {"w": jax.random.normal(key[0], (4, 6))},
        "b": jax.random.normal(key[1], (7,)),
        "only_shared": jnp.ones((2,)),
    }
    experts = {
        "a": {"w": jax.random.normal(key[2], (E, 4, 6))},
        "b": jax.random.normal(key[3], (E, 7)),
    }
    return shared, {"dense": experts}


def close(a, b, tolerance=1e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=tolerance), a, b)


def test_one_hot_is_shared_plus_that_expert(soup):
    shared, bank = soup
    for e in range(E):
        theta = merge.merge(shared, bank, jnp.eye(E)[e])
        close(theta["a"]["w"], shared["a"]["w"] + bank["dense"]["a"]["w"][e])
        close(theta["b"], shared["b"] + bank["dense"]["b"][e])


def test_linear_in_alpha(soup):
    shared, bank = soup
    x, y = jax.random.normal(jax.random.key(1), (2, E))
    at = lambda alpha: merge.merge(shared, bank, alpha)  # noqa: E731
    left = at(2.0 * x - 3.0 * y)
    # Theta is affine: S + A(alpha). Differences from S are linear.
    right = jax.tree.map(lambda s, p, q: s + 2.0 * (p - s) - 3.0 * (q - s), shared, at(x), at(y))
    close(left, right, 1e-4)


def test_zero_alpha_and_leaves_without_experts_are_shared(soup):
    shared, bank = soup
    close(merge.merge(shared, bank, jnp.zeros(E)), shared, 0)
    theta = merge.merge(shared, bank, jnp.ones(E))
    close(theta["only_shared"], shared["only_shared"], 0)


def test_many_at_once_equals_one_by_one(soup):
    shared, bank = soup
    alpha_ME = jax.random.normal(jax.random.key(2), (M, E))
    many = merge.merge_many(shared, bank, alpha_ME)
    for m in range(M):
        close(jax.tree.map(lambda x, m=m: x[m], many), merge.merge(shared, bank, alpha_ME[m]))


def test_sums_in_float32_and_rounds_once(soup):
    shared, bank = soup
    exact = merge.merge(shared, bank, jnp.ones(E))
    rounded = merge.merge(shared, bank, jnp.ones(E), dtype="bfloat16")
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x.astype(jnp.bfloat16), y), exact, rounded
    )


def test_bfloat16_bank_is_not_accumulated_in_bfloat16():
    bank = {"w": jnp.full((256, 1), 1.0, jnp.bfloat16).at[0].set(256.0)}
    theta = merge.merge({"w": jnp.zeros((1,))}, {"dense": bank}, jnp.ones(256))
    assert float(theta["w"][0]) == 511.0  # bfloat16 sums would stick at 256
