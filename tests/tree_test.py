import jax
import jax.numpy as jnp
import pytest

from soup_jax import tree
from soup_jax.errors import UserError

TREE = {"a": {"b": jnp.zeros((2, 3)), "c": jnp.ones(4)}, "d": jnp.zeros(())}


def test_flatten_and_unflatten_are_inverse():
    leaves = tree.flatten(TREE)
    assert list(leaves) == ["a/b", "a/c", "d"]
    assert jax.tree.structure(tree.unflatten(leaves)) == jax.tree.structure(TREE)


def test_first_matching_rule_wins():
    rules = (("a/.*", "none"), (".*", "dense"))
    assert tree.match_rules(rules, list(tree.flatten(TREE))) == {
        "a/b": "none",
        "a/c": "none",
        "d": "dense",
    }


def test_a_rule_must_match_the_whole_path():
    with pytest.raises(UserError, match="no rule matches the leaf 'a/b'"):
        tree.match_rules((("a", "dense"),), ["a/b"])


def test_a_rule_that_applies_to_no_leaf_is_refused():
    for wrong in ("e/.*", "a/b"):  # no such name; taken by the rule before
        rules = (("a/.*", "none"), (wrong, "low_rank:2"), (".*", "dense"))
        with pytest.raises(UserError, match=rf"\('{wrong}', 'low_rank:2'\) applies to no leaf"):
            tree.check_rules_used(rules, ["a/b", "d"])
    tree.check_rules_used((("a/.*", "none"), (".*", "dense")), ["a/b"])


def test_a_broken_regex_is_named():
    with pytest.raises(UserError, match=r"'\[' is not a regular expression"):
        tree.match_rules((("[", "dense"),), ["a"])


def test_sizes():
    assert tree.num_params(TREE) == 11
    assert tree.num_bytes(TREE) == 44


def test_norm_scales_and_biases_are_no_matrices():
    assert tree.is_matrix("layers/mlp/up", 3)
    assert tree.is_matrix("embedding", 2)
    assert not tree.is_matrix("layers/mlp_norm/scale", 2)
    assert not tree.is_matrix("final_norm/scale", 1)
    assert not tree.is_matrix("hidden_bias", 2)
    for name in ("LayerNorm_0/scale", "attn_norm/weight", "ln_1/scale", "ln1/weight", "ln/gamma"):
        assert not tree.is_matrix(f"layers/{name}", 2)
        assert not tree.is_matrix(name, 2)
    for name in ("linear/weight", "mlp/up", "kiln/scale"):
        assert tree.is_matrix(f"layers/{name}", 3)
