"""The hand-written backward passes against autodiff of the plain formulas."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from soup_jax.errors import UserError
from soup_jax.models import ops as layers

B, L, D, V = 3, 16, 8, 23


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def check_same(ours, plain, *arguments):
    """Values and gradients of a random functional, also side by side under vmap."""
    weights = normal(*plain(*arguments).shape, seed=9)
    floats = tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))

    def both(f):
        return jax.value_and_grad(lambda *a: (f(*a) * weights).sum(), floats)

    two = [jnp.stack([a, a[::-1]]) for a in arguments]
    for map_, given in ((lambda f: f, arguments), (jax.vmap, two)):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
            jax.jit(map_(both(ours)))(*given),
            jax.jit(map_(both(plain)))(*given),
        )


@pytest.mark.parametrize("features", [4, 2 * D])
def test_matmul(features):
    check_same(layers.matmul, jnp.matmul, normal(B, L, D), normal(D, features))


@pytest.mark.parametrize("chunk", [0, 4])
def test_losses(chunk):
    targets = jnp.asarray(np.random.default_rng(0).integers(0, V, (B, L)))

    def plain(x, head, targets):
        log_probs = jax.nn.log_softmax(x @ head)
        return -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]

    def ours(x, head, targets):
        return layers.token_losses(x, head, targets, chunk=chunk)

    check_same(ours, plain, normal(B, L, D), normal(D, V), targets)


@pytest.mark.parametrize("kv_heads", [2])
def test_attention(kv_heads):
    def plain(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    query, key = normal(B, L, 4, D), normal(B, L, kv_heads, D)
    check_same(layers.attend, plain, query, key, normal(B, L, kv_heads, D, seed=1))


def test_attention_that_sees_no_other_document():
    token = jnp.asarray(np.random.default_rng(1).integers(0, 5, (B, L)))
    position = jnp.broadcast_to(jnp.arange(L), (B, L))

    def ours(q, k, v, token):
        return layers.attend(q, k, v, layers.document_begins(token, position, 3))

    def plain(q, k, v, token):
        document = (token == 3).cumsum(axis=1)
        mask = document[:, None, :, None] == document[:, None, None]
        return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=True)

    query, key = normal(B, L, 4, D), normal(B, L, 2, D)
    check_same(ours, plain, query, key, normal(B, L, 2, D, seed=1), token)


def test_gradients_of_rows_are_added_in_float32():
    table, token = normal(V, D), jnp.asarray(np.arange(3 * 400) % 3).reshape(3, 400)
    dy = normal(3, 400, D)

    def gradient(look_up, dtype):
        def loss(t):
            return (look_up(t, token) * dy.astype(dtype)).sum()

        return jax.jit(jax.grad(loss))(table.astype(dtype))

    exact = gradient(lambda t, token: t[token], "float32")
    np.testing.assert_allclose(gradient(layers.look_up, "float32"), exact, atol=1e-4)
    ours = gradient(layers.look_up, "bfloat16")
    assert ours.dtype == jnp.bfloat16
    bound = 0.01 * abs(exact).max()
    assert abs(ours.astype(jnp.float32) - exact).max() < bound
    plain = gradient(lambda t, token: t[token], "bfloat16").astype(jnp.float32)
    assert abs(plain - exact).max() > bound


def test_bfloat16_gradients_stay_near_those_of_float32():
    query, key = normal(B, L, 4, D), normal(B, L, 2, D)

    def gradient(dtype):
        q, k = query.astype(dtype), key.astype(dtype)
        grads = jax.jit(jax.grad(lambda q, k: layers.attend(q, k, k).sum(), (0, 1)))(q, k)
        assert {g.dtype for g in grads} == {jnp.dtype(dtype)}
        return jnp.concatenate([g.astype(jnp.float32).ravel() for g in grads])

    exact = gradient("float32")
    assert 0 < abs(gradient("bfloat16") - exact).max() < 0.03 * abs(exact).max()


@pytest.mark.parametrize(
    ("kind", "dtype", "head_dim", "takes"),
    [
        ("cpu", "bfloat16", 64, False),
        ("9.0", "bfloat16", 64, True),
        ("9.0", "float32", 64, False),
        ("9.0", "bfloat16", 36, False),
        ("9.0", "bfloat16", 256, False),
        ("7.5", "bfloat16", 64, False),
        ("rocm", "bfloat16", 64, False),
    ],
)
def test_where_cudnn_is_taken(kind, dtype, head_dim, takes, monkeypatch):
    device = types.SimpleNamespace(
        platform="cpu" if kind == "cpu" else "gpu",
        compute_capability=kind,
        client=types.SimpleNamespace(platform_version=kind if kind == "rocm" else "cuda 13000"),
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    query = jnp.zeros((1, 8, 2, head_dim), dtype)
    assert layers._cudnn_takes(query) == takes
    if not takes:
        device.device_kind = "the one here"
        with pytest.raises(UserError, match=f"{dtype}, heads of {head_dim} and the one here"):
            layers.attend(query, query, query, kind="cudnn")
    else:  # what cuDNN gets, with and without documents
        given = []
        monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *_, **kw: given.append(kw))
        begin = jnp.asarray([[0, 0, 0, 3, 3, 3, 6, 6]])
        layers.attend(query, query, query, kind="cudnn")
        layers.attend(query, query, query, begin, kind="cudnn")
        assert [kw["implementation"] for kw in given] == ["cudnn", "cudnn"]
        assert given[0]["mask"] is None
        assert given[1]["mask"].shape == (1, 1, 8, 8)
        assert given[1]["mask"][0, 0].sum(-1).tolist() == [8, 8, 8, 5, 5, 5, 2, 2]
        layers.attend(query[:, :7], query[:, :7], query[:, :7], begin[:, :7])  # by XLA
        assert len(given) == 2


def test_attention_keeps_no_scores_for_the_backward_pass():
    rows, length, heads, head_dim = 2, 64, 4, 8
    shape = jax.ShapeDtypeStruct((rows, length, heads, head_dim), jnp.float32)
    attend = functools.partial(layers.attend, kind="xla")
    kept = jax.tree.leaves(jax.eval_shape(lambda *a: jax.vjp(attend, *a)[1], *[shape] * 3))
    assert kept
    assert max(x.size for x in kept) < rows * heads * length * length
    plain = jax.eval_shape(lambda *a: jax.vjp(jax.nn.dot_product_attention, *a)[1], *[shape] * 3)
    assert max(x.size for x in jax.tree.leaves(plain)) >= rows * heads * length * length
