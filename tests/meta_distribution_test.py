import json

import numpy as np
import pytest

from soup_jax.config import schema
from soup_jax.data import meta_distribution as domain_weights
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.experiments import base

FREQUENCIES = np.array([0.4, 0.3, 0.0, 0.2, 0.1])


def meta(*, probabilities=(1.0, 0.0, 0.0, 0.0), low=2, high=2, rows=None, concentration=5.0):
    return domain_weights.MetaDistribution(
        probabilities, FREQUENCIES, low, high, concentration, rows
    )


def draws(m, num=2000, seed=0):
    return domain_weights.sample_domain_weights(
        m, np.random.default_rng(seed), step=0, num_mixtures=num
    )


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


def test_dirichlet_keeps_the_mass_of_large_domains_among_thousands():
    # Nearly all shapes are far below 1 here: 0.002 is the mean.
    frequencies_K = np.arange(1, 4097) ** -0.78
    frequencies_K /= frequencies_K.sum()
    mass = frequencies_K[:100].sum()
    assert 0.35 < mass < 0.45
    m = domain_weights.MetaDistribution((0, 0, 1.0, 0), frequencies_K, 1, 1, 8.0)
    drawn = draws(m, num=1000)[:, :100].sum(1)  # Beta(8 mass, 8 (1 - mass))
    variance = mass * (1 - mass) / (8 + 1)
    assert abs(drawn.mean() - mass) < 4.5 * np.sqrt(variance / 1000)
    np.testing.assert_allclose(drawn.var(), variance, rtol=0.25)


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
    assert meta().fingerprint() == (
        "d7fe2a89dd138a2ba0aec062b6a221757f692274427702070013bc851704c489"  # checkpoints hold it
    )


class Widening:
    """From outside: a uniform h over the first domains, more of them with every `every` steps."""

    def __init__(self, frequencies_K, *, every=10):
        self.available, self.every = np.flatnonzero(frequencies_K), every

    def draw(self, rng, step, h_K):
        h_K[self.available[: 1 + step // self.every]] = 1
        return True

    def fingerprint(self):
        return f"widening-{self.every}"


class Wrong(Widening):
    """Gives the weights that it is made with."""

    def __init__(self, frequencies_K, *, weights):
        self.weights = weights

    def draw(self, rng, step, h_K):
        h_K[:] = self.weights


def config_with(*components, **probabilities):
    cfg = base.get_config()
    with cfg.unlocked():
        cfg.num_domains = 5
        cfg.domain_weights.update({"sparse": 0.0, "generic": 0.0} | probabilities)
        cfg.domain_weights.update({"support_size": 2, "components": components})
    return schema.check(cfg)


def test_a_component_from_outside_follows_its_schedule():
    cfg = config_with((f"{__name__}:Widening", 0.5, (("every", 100),)), generic=0.5)
    m = domain_weights.from_config(cfg, FREQUENCIES)
    plan = SamplingPlan(
        m, num_windows_K=np.array([4, 3, 0, 2, 1]), batch_size=8, num_mixtures=8, seed=0
    )
    for step, num_domains in ((0, 1), (99, 1), (250, 3)):
        own = [h_K for h_K in plan[step].h_MK if not np.array_equal(h_K, FREQUENCIES)]
        assert 0 < len(own) < 8
        assert all((h_K > 0).sum() == num_domains for h_K in own)
        np.testing.assert_allclose([h_K.sum() for h_K in own], 1)
    # Going back, and on from kept cursors, gives the same.
    again = SamplingPlan(m, num_windows_K=plan.num_windows_K, batch_size=8, num_mixtures=8, seed=0)
    again.restore(200, plan.cursors(200))
    for name in ("h_MK", "domain_B", "window_B"):
        np.testing.assert_array_equal(getattr(again[250], name), getattr(plan[250], name))
    other = config_with((f"{__name__}:Widening", 0.5), generic=0.5)
    assert domain_weights.from_config(other, FREQUENCIES).fingerprint() != m.fingerprint()


def test_components_of_ours_can_be_drawn_with_other_arguments():
    cfg = config_with(("sparse", 0.5, (("support_size", 4), ("min_support_size", 4))), sparse=0.5)
    sizes = (draws(domain_weights.from_config(cfg, FREQUENCIES)) > 0).sum(1)
    assert set(sizes.tolist()) == {1, 2, 4}


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((0.5, 0.5, 0, 0, 0.5), "Wrong at step 0: domain weights add up to 1.5"),
        ((1.5, -0.5, 0, 0, 0), "not negative"),
        ((np.nan, 0, 0, 0, 0), "finite"),
        ((0, 0, 0, 0, 0), "not all zero"),
        ((0.5, 0, 0.5, 0, 0), r"weighs domains without windows: \[2\]"),
    ],
)
def test_refuses_what_is_not_domain_weights(weights, message):
    cfg = config_with((f"{__name__}:Wrong", 1.0, (("weights", weights),)))
    with pytest.raises(UserError, match=message):
        draws(domain_weights.from_config(cfg, FREQUENCIES), num=1)


@pytest.mark.parametrize(
    ("component", "message"),
    [
        (("spars", 1.0), "did you mean sparse"),
        (("sparse", 1.0, (("size", 3),)), "domain_weights.components: sparse with .*'size'"),
        (("nowhere:make", 1.0), "there is no module nowhere"),
        (("generic", 0.9), "must add up to 1, not 0.9"),
        (("generic", 1.0, ("size", 3)), "must be a tuple of"),
        (("generic",), "must be a tuple of"),
    ],
)
def test_refuses_components_that_cannot_be_made(component, message):
    with pytest.raises(UserError, match=message):
        domain_weights.from_config(config_with(component), FREQUENCIES)


def test_components_come_back_from_a_saved_config(tmp_path):
    cfg = config_with(("sparse", 1.0, (("support_size", 4), ("weights", (1, 2)))))
    schema.save(cfg, tmp_path / "config.json")
    assert schema.load(tmp_path / "config.json") == cfg
