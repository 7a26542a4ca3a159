import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import tree
from soup_jax.errors import UserError
from soup_jax.soup import bank as experts
from soup_jax.training import build

SHARED = {
    "norm": {"scale": jnp.ones(16)},
    "mlp": {"up": 0.5 * jax.random.normal(jax.random.key(0), (64, 96))},
}


def bank(**changes):
    options = {"num_experts": 8, "rules": ((".*", "dense"),), "init_scale": 0.1} | changes
    return experts.init_bank(jax.random.key(1), SHARED, **options)


def test_experts_stand_on_a_leading_axis():
    shapes = {p: x.shape for p, x in tree.flatten(bank()).items()}
    assert shapes == {"dense/norm/scale": (8, 16), "dense/mlp/up": (8, 64, 96)}
    assert experts.num_experts(bank()) == 8


def test_rules_choose_the_leaves_and_must_cover_all():
    chosen = bank(rules=((r"norm/.*", "none"), (".*", "dense")))
    assert list(tree.flatten(chosen)) == ["dense/mlp/up"]
    with pytest.raises(UserError, match="no rule matches the leaf 'norm/scale'"):
        bank(rules=((r"mlp/.*", "dense"),))


def test_experts_of_no_leaf_are_refused():
    with pytest.raises(UserError, match="num_experts = 8, but every leaf has the rule 'none'"):
        bank(rules=((".*", "none"),))
    assert bank(rules=((".*", "none"),), num_experts=0) == {}


def test_init_scale_is_relative_to_the_shared_leaf_and_experts_differ():
    up = bank()["dense"]["mlp"]["up"]
    np.testing.assert_allclose(up.std(axis=(1, 2)), 0.05, rtol=0.05)
    assert not np.allclose(up[0], up[1])


def test_zero_scale_gives_zeros_and_zero_experts_an_empty_bank():
    assert all((x == 0).all() for x in jax.tree.leaves(bank(init_scale=0.0)))
    assert bank(num_experts=0) == {}
    assert experts.num_experts({}) == 0


def test_storage_dtype():
    assert {x.dtype for x in jax.tree.leaves(bank(dtype="bfloat16"))} == {jnp.dtype("bfloat16")}


def test_a_rule_is_a_kind_and_what_it_takes():
    assert experts.parse_rule("none") == ("", "")
    assert experts.parse_rule("dense") == ("dense", "")
    assert experts.parse_rule("low_rank:8") == ("low_rank", "8")
    assert experts.parse_rule("outside:Offset") == ("outside:Offset", "")
    assert experts.parse_rule("outside:Offset:3") == ("outside:Offset", "3")


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("low_rnk", r"\(did you mean low_rank\?\)"),
        ("lowrank=16", r"\(did you mean low_rank\?\)"),
        ("Dense", r"\(did you mean dense\?\)"),
        ("outside:Missing", "module outside has no attribute Missing"),
        ("", "unknown kind of experts ''"),
    ],
)
def test_a_config_with_a_rule_that_does_not_exist_is_refused(rule, message):
    cfg = tiny_config(**{"experts.rules": ((".*", rule),)})
    with pytest.raises(UserError, match=f"experts.rules: {rule!r} is no rule for .*{message}"):
        build.soup_config(cfg)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("low_rank", "'low_rank' is no rule .* a rank R of at least 1"),
        ("low_rank:0", "'low_rank:0' is no rule .* a rank R of at least 1"),
        ("dense:2", "'dense' takes no argument, not '2'"),
    ],
)
def test_an_argument_that_a_kind_cannot_take_is_refused(rule, message):
    with pytest.raises(UserError, match=message):
        bank(rules=((r"mlp/.*", rule), (".*", "none")))
