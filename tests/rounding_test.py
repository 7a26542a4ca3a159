"""Stochastic rounding to bfloat16: right on average, exact where nothing is lost, fresh bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.optim import rounding

STEP = 2.0**-7  # distance of bfloat16 numbers in [1, 2)


def rounded(values, *, step=0, name="w", first=0):
    seed = rounding.seed_of(jnp.int32(step), name)
    return np.asarray(
        rounding.store(jnp.asarray(values, jnp.float32), "bfloat16", seed=seed, first=first),
        np.float32,
    )


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.5, 0.9])
def test_the_mean_is_right_and_only_the_neighbours_occur(fraction):
    num = 100_000
    value = 1 + fraction * STEP
    found = rounded(np.full((100, num // 100), value))
    assert set(np.unique(found)) <= {np.float32(1), np.float32(1 + STEP)}
    share = (found > 1).mean()
    np.testing.assert_allclose(share, fraction, atol=5 * np.sqrt(0.25 / num))


def test_negative_numbers_are_rounded_like_positive_ones():
    x = np.linspace(0.5, 3, 1001)
    np.testing.assert_array_equal(rounded(-x), -rounded(x))


def test_small_updates_survive_that_rounding_to_the_nearest_loses():
    def add(x, step, seeded):
        seed = rounding.seed_of(step, "w") if seeded else None
        return rounding.store(x.astype(jnp.float32) + STEP / 20, "bfloat16", seed=seed)

    for seeded, expected in ((False, 1.0), (True, 1.0 + 200 * STEP / 20)):
        x = jnp.ones(4096, jnp.bfloat16)
        for step in range(200):
            x = add(x, jnp.int32(step), seeded)
        # From 2 on the distance doubles, which widens the spread but not the mean.
        np.testing.assert_allclose(np.asarray(x, np.float32).mean(), expected, atol=2e-3)


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -384.0, np.inf, -np.inf, 3.4e38, -3.4e38])
def test_exact_extreme_and_infinite_numbers(value):
    found = rounded(np.full(64, value))
    expected = np.asarray(jnp.full(64, value, jnp.float32).astype(jnp.bfloat16), np.float32)
    np.testing.assert_array_equal(found, expected)


def test_nan_stays_nan():
    assert np.isnan(rounded([np.nan, -np.nan])).all()


def test_steps_and_leaves_draw_their_own_bits():
    x = np.full(4096, 1 + STEP / 2)
    keys = [(0, "w"), (1, "w"), (0, "v"), (7, "bank/w")]
    up = {key: rounded(x, step=key[0], name=key[1]) > 1 for key in keys}
    for i, a in enumerate(keys):
        for b in keys[i + 1 :]:
            correlation = np.corrcoef(up[a], up[b])[0, 1]
            assert abs(correlation) < 5 / np.sqrt(4096), (a, b)


def test_neighbours_are_not_correlated():
    up = (rounded(np.full((64, 512), 1 + STEP / 2)) > 1).astype(float)
    for shifted in (up[1:], up[:, 1:]):
        same = up[: shifted.shape[0], : shifted.shape[1]]
        assert abs(np.corrcoef(same.ravel(), shifted.ravel())[0, 1]) < 0.03


def test_parts_of_a_leaf_round_as_the_whole():
    x = np.random.default_rng(0).normal(size=(12, 5, 7))
    whole = rounded(x)
    parts = [rounded(x[i : i + 4], first=i) for i in range(0, 12, 4)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_slices_on_devices_round_as_the_whole():
    x = np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32)
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "d"))
    seed = rounding.seed_of(jnp.int32(0), "w")
    found = jax.jit(lambda y: rounding.store(y, "bfloat16", seed=seed))(jax.device_put(x, spec))
    np.testing.assert_array_equal(np.asarray(found, np.float32), rounded(x))


def test_without_a_seed_to_the_nearest_and_float32_as_it_is():
    x = jnp.asarray([1 + STEP / 3, 1 + STEP / 1.5])
    np.testing.assert_array_equal(rounding.store(x, "bfloat16"), x.astype(jnp.bfloat16))
    seed = rounding.seed_of(jnp.int32(0), "w")
    np.testing.assert_array_equal(rounding.store(x, "float32", seed=seed), x)
