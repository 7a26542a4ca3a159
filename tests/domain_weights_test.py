import json

import numpy as np
import pytest

from soup_jax.data import meta_distribution as domain_weights
from soup_jax.errors import UserError
from soup_jax.experiments import base

FREQUENCIES = np.array([0.4, 0.3, 0.0, 0.2, 0.1])


def meta(*, probabilities=(1.0, 0.0, 0.0, 0.0), low=2, high=2, rows=None, concentration=5.0):
    return domain_weights.MetaDistribution(
        probabilities, FREQUENCIES, low, high, concentration, rows
    )


def draws(m, num=2000, seed=0):
    return domain_weights.sample_domain_weights(m, np.random.default_rng(seed), num_mixtures=num)


@pytest.mark.parametrize(
    "m",
    [
        meta(),
        meta(low=1, high=4),
        meta(probabilities=(0.0, 1.0, 0.0, 0.0)),
        meta(probabilities=(0.0, 0.0, 1.0, 0.0)),
        meta(probabilities=(0.0, 0.0, 1.0, 0.0), concentration=1e-6),
        meta(probabilities=(0.25, 0.25, 0.25, 0.25), rows=np.eye(5)[:2]),
    ],
)
def test_every_draw_lies_on_the_simplex_and_avoids_empty_domains(m):
    h_MK = draws(m)
    np.testing.assert_allclose(h_MK.sum(1), 1, atol=1e-12)
    assert (h_MK >= 0).all()
    assert (h_MK[:, 2] == 0).all()


def test_sparse_support_is_uniform_over_the_available_domains():
    h_MK = draws(meta(), num=8000)
    assert ((h_MK > 0).sum(1) == 2).all()
    share = (h_MK > 0).mean(0)[[0, 1, 3, 4]]
    np.testing.assert_allclose(share, 0.5, atol=4 * np.sqrt(0.25 / 8000))


def test_support_exponent_one_makes_the_mean_h_of_single_domains_natural():
    m = domain_weights.MetaDistribution((1.0, 0, 0, 0), FREQUENCIES, 1, 1, 5.0, None, 1.0)
    bound = 4.5 * np.sqrt(FREQUENCIES * (1 - FREQUENCIES) / 8000)
    assert (abs(draws(m, num=8000).mean(0) - FREQUENCIES) <= bound).all()


def test_support_sizes_cover_their_range_log_uniformly():
    sizes = (draws(meta(low=1, high=3), num=8000) > 0).sum(1)
    expected = np.log([2 / 1, 3 / 2, 4 / 3]) / np.log(4)
    observed = np.bincount(sizes, minlength=4)[1:] / 8000
    np.testing.assert_allclose(observed, expected, atol=0.03)


def test_dirichlet_mean_is_the_natural_frequencies():
    h_MK = draws(meta(probabilities=(0.0, 0.0, 1.0, 0.0)), num=8000)
    np.testing.assert_allclose(h_MK.mean(0), FREQUENCIES, atol=0.02)


def test_generic_draw_is_exactly_the_natural_frequencies():
    h_MK = draws(meta(probabilities=(0.0, 1.0, 0.0, 0.0)), num=3)
    np.testing.assert_array_equal(h_MK, np.tile(FREQUENCIES, (3, 1)))


def test_components_are_drawn_with_their_probabilities():
    rows = np.eye(5)[:1]
    h_MK = draws(meta(probabilities=(0.0, 0.7, 0.0, 0.3), rows=rows), num=8000)
    assert abs((h_MK[:, 0] == 1).mean() - 0.3) < 4 * np.sqrt(0.21 / 8000)


def config_with_file(path):
    cfg = base.get_config()
    with cfg.unlocked():
        cfg.num_domains = 5
        cfg.domain_weights.update({"sparse": 0.0, "generic": 0.0, "file": 1.0, "path": str(path)})
    return cfg


@pytest.mark.parametrize("value", [[0.5, 0.5, 0, 0, 0], {"h": [0.5, 0.5, 0, 0, 0]}])
def test_a_file_with_one_row_fixes_h(tmp_path, value):
    path = tmp_path / "h.json"
    path.write_text(json.dumps(value))
    m = domain_weights.from_config(config_with_file(path), FREQUENCIES)
    np.testing.assert_array_equal(draws(m, num=4), np.tile([0.5, 0.5, 0, 0, 0], (4, 1)))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([0.5, 0.5], "expected rows of 5 weights"),
        ([0.9, 0.5, 0, 0, 0], "add up to 1"),
        ([1.5, -0.5, 0, 0, 0], "non-negative"),
        (["a", 0, 0, 0, 0], "must hold a list of 5 numbers"),
        ([0, 0, 1.0, 0, 0], r"weighs domains without windows: \[2\]"),
    ],
)
def test_refuses_a_file_that_is_not_domain_weights(tmp_path, value, message):
    path = tmp_path / "h.json"
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=message):
        domain_weights.from_config(config_with_file(path), FREQUENCIES)


def test_fingerprint_tells_distributions_apart():
    assert meta().fingerprint() == meta().fingerprint()
    assert meta().fingerprint() != meta(high=3).fingerprint()
