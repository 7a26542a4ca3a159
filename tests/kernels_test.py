"""Both forms of every kernel agree, and with numpy; a CPU runs what accelerators would."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.soup import kernels

FORMS = ("cpu", "accelerator")


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def both(function, *arguments):
    """What each form gives, as numpy arrays."""
    found = []
    for form in FORMS:
        with kernels.only(form):
            found.append(jax.tree.map(np.asarray, function(*arguments)))
    return found


def test_a_form_is_chosen_inside_the_block_only():
    def chosen():
        return str(kernels.by_platform(cpu=lambda: "cpu", accelerator=lambda: "accelerator"))

    with kernels.only("accelerator"):
        assert chosen() == "accelerator"
        with kernels.only("cpu"):
            assert chosen() == "cpu"
        assert chosen() == "accelerator"
    number = kernels.by_platform(1.0, cpu=lambda x: x + 1, accelerator=lambda x: x - 1)
    assert float(number) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_mixtures", [1, 5])
@pytest.mark.parametrize("num_experts", [1, 20])
@pytest.mark.parametrize("shape", [(), (4, 6), (2, 3, 5)])
def test_combine_and_inner(dtype, num_mixtures, num_experts, shape):
    alpha_ME, leaf_M = normal(num_mixtures, num_experts), normal(num_mixtures, *shape)
    leaf_E = normal(num_experts, *shape).astype(dtype)
    exact = np.asarray(leaf_E, np.float64)
    expected = np.tensordot(np.asarray(alpha_ME, np.float64), exact, 1)
    # Two bfloat16 parts hold 16 bits of a float32 number.
    tolerance = {"float32": 1e-5, "bfloat16": 5e-4}[dtype]
    for found in both(kernels.combine, alpha_ME, leaf_E):
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, atol=tolerance)
    axes = tuple(range(1, len(shape) + 1))
    expected = np.tensordot(exact, np.asarray(leaf_M, np.float64), (axes, axes))
    for whole in (True, False):
        for found in both(lambda m, e: kernels.inner(m, e, whole=whole), leaf_M, leaf_E):  # noqa: B023
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, expected, atol=tolerance)


def test_two_bfloat16_parts_hold_16_bits():
    alpha_ME, leaf_E = normal(3, 8), normal(8, 16).astype(jnp.bfloat16)
    with kernels.only("accelerator"):
        found = kernels.combine(alpha_ME, leaf_E)
    exact = np.asarray(alpha_ME, np.float64) @ np.asarray(leaf_E, np.float64)
    assert np.abs(found - exact).max() / np.abs(exact).max() < 2**-14
    rounded = alpha_ME.astype(jnp.bfloat16).astype(jnp.float32) @ leaf_E.astype(jnp.float32)
    assert np.abs(rounded - exact).max() / np.abs(exact).max() > 2**-11


def test_sums_over_mixtures_and_their_norm():
    leaf_M, alpha_ME = normal(5, 4, 6), normal(5, 3)
    for found in both(kernels.over_mixtures, leaf_M):
        np.testing.assert_allclose(found, np.asarray(leaf_M).sum(0), atol=1e-5)
    # With a Gram matrix as weights it is the norm of the experts' gradient.
    expected = np.square(np.einsum("ME,Mij->Eij", alpha_ME, leaf_M)).sum()
    for found in both(kernels.weighted_norm, alpha_ME @ alpha_ME.T, leaf_M):
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.mark.parametrize("good", [True, False])
def test_computed_once_or_zeros(good):
    x = {"a": normal(3), "b": normal(2, 2)}
    x["a"] = x["a"] if good else x["a"].at[0].set(jnp.nan)  # must not get through

    def function(t):
        return {"sum": t["a"].sum(), "twice": 2 * t["b"]}

    expected = jax.tree.map(lambda v: v if good else jnp.zeros_like(v), function(x))
    for found in both(lambda t: kernels.computed_once(function, t, good=jnp.asarray(good)), x):
        jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("num_terms", [3, 12])
@pytest.mark.parametrize("num_experts", [5, 21])
def test_update_stacks_at_once_and_in_blocks(num_terms, num_experts):
    """Few terms, which a CPU adds in one pass, and many; 21 experts are two blocks and a rest."""
    weight_SE, term_S = normal(num_terms, num_experts), normal(num_terms, 4, 3)
    stacks = normal(num_experts, 4, 3), normal(num_experts, 4, 3, seed=1)

    def functions(expert_sum):
        def first_stack(first, x, y):
            return x - expert_sum(weight_SE, term_S, first, x.shape[0])

        def second_stack(first, x, y):
            index = first + jnp.arange(y.shape[0])
            return y + x + index[:, None, None]

        return first_stack, second_stack

    def update(*stacks):
        return jax.jit(
            lambda *s: kernels.update_stacks(functions, s, num_terms=num_terms)
        )(*stacks)  # fmt: skip

    x = stacks[0] - np.einsum("SE,Sij->Eij", weight_SE, term_S)
    y = stacks[1] + x + np.arange(num_experts)[:, None, None]  # sees the new first stack
    assert kernels.block_size(num_terms, num_experts) in (8, num_experts)
    for found in both(update, *stacks):
        np.testing.assert_allclose(found[0], x, atol=1e-5)
        np.testing.assert_allclose(found[1], y, atol=1e-5)
