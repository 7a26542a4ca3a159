import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from soup_jax import soup, tree
from soup_jax.errors import UserError
from soup_jax.experiments import base
from soup_jax.models import base as model
from soup_jax.models import llama
from soup_jax.training import build

CONFIG = llama.LlamaConfig(
    vocab_size=97, num_layers=2, dim=32, num_heads=4, num_kv_heads=2, hidden_dim=48
)
L = 16


@pytest.fixture(scope="module")
def tokens():
    return jnp.asarray(np.random.default_rng(0).integers(0, 97, (3, L)), jnp.int32)


@functools.cache
def init(config=CONFIG):
    return jax.jit(llama.base_model(config, seq_len=L).init)(jax.random.key(0))


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, tokens):
    return llama.Llama(config).apply({"params": params}, tokens)


def test_no_position_sees_the_future():
    # Untied, so that the output depends on x only through the inputs; one token per position, so
    # that the embeddings are a differentiable input.
    config = dataclasses.replace(CONFIG, tie_embeddings=False, vocab_size=L)
    module, params = llama.Llama(config), init(config)

    def logits(x):
        return module.apply({"params": {**params, "embedding": x[0]}}, jnp.arange(L)[None])

    embedded = params["embedding"][None]
    reach_of = jax.jit(jax.jacobian(lambda x: logits(x)[0].sum(-1)))
    jacobian = reach_of(embedded)[:, 0]  # [L out, L in, D]
    reach = abs(jacobian).sum(-1)
    assert (np.triu(reach, 1) == 0).all()
    assert (np.diag(reach) > 0).all()
    assert (reach[-1] > 0).all()


def test_cached_decoding_equals_the_full_forward(tokens):
    params = init()
    full = forward(CONFIG, params, tokens[:2])
    model = llama.base_model(CONFIG, seq_len=L)
    decode = jax.jit(functools.partial(model.decode, cache_len=32))
    params = model.decode_params(params)
    logits, cache = decode(params, tokens[:2, :5], jnp.zeros(2, jnp.int32), None)
    np.testing.assert_allclose(logits, full[:, :5], atol=2e-5)
    # The second row is one token ahead of the first.
    _, ahead = decode(params, tokens[:2, :6], jnp.zeros(2, jnp.int32), None)
    cache = jax.tree.map(lambda a, b: jnp.stack([a[0], b[1]]), cache, ahead)
    for i in range(5, L - 1):
        at = jnp.array([i, i + 1])
        logits, cache = decode(params, tokens[[0, 1], at][:, None], at, cache)
        np.testing.assert_allclose(logits[:, 0], full[jnp.arange(2), at], atol=2e-5)


def test_decoding_keeps_matrices_in_the_type_they_are_used_in(tokens):
    half = dataclasses.replace(CONFIG, dtype="bfloat16")
    params, network = init(), llama.base_model(half, seq_len=L)
    prepared = network.decode_params(params)
    assert {x.dtype.name for x in jax.tree.leaves(prepared) if x.ndim > 1} == {"bfloat16"}
    assert {x.dtype.name for x in jax.tree.leaves(prepared) if x.ndim == 1} == {"float32"}
    logits, _ = network.decode(prepared, tokens, jnp.zeros(3, jnp.int32), None, cache_len=L)
    np.testing.assert_allclose(logits, forward(half, params, tokens), atol=0.04)
    assert abs(logits).max() > 1


RESET = dataclasses.replace(CONFIG, attention_reset=7)


def test_documents_of_a_window_see_nothing_of_each_other(tokens):
    params = init()
    packed = jnp.where(tokens == 7, 8, tokens).at[:, jnp.array([5, 11])].set(7)
    found = forward(RESET, params, packed)
    for part in (slice(0, 5), slice(5, 11), slice(11, L)):
        alone = forward(CONFIG, params, packed[:, part])
        np.testing.assert_allclose(found[:, part], alone, atol=2e-5)
    assert abs(found - forward(CONFIG, params, packed))[:, 6:].max() > 0.01
    rows = {"tokens": packed, "num_targets": jnp.full(3, L - 1)}
    for remat in ("none", "full"):
        config = dataclasses.replace(RESET, remat=remat)
        losses, _ = llama.base_model(config, seq_len=L).example_losses(params, rows)
        plain, _ = model.next_token_losses(lambda t: forward(RESET, params, t), rows)
        np.testing.assert_allclose(losses, plain, atol=2e-5)


@pytest.mark.parametrize("padding", [0, 7])
def test_a_cache_knows_where_the_document_begins(tokens, padding):
    params = init()
    packed = tokens[:2].at[:, jnp.array([3, 9])].set(7)
    full = forward(RESET, params, packed)
    network = llama.base_model(RESET, seq_len=L)
    decode = jax.jit(functools.partial(network.decode, cache_len=32))
    params = network.decode_params(params)
    # A padded prompt, of a token that ends documents perhaps: it is behind all that is asked for.
    prompt = packed[:, :8].at[:, 5:].set(padding)
    logits, cache = decode(params, prompt, jnp.zeros(2, jnp.int32), None)
    np.testing.assert_allclose(logits[:, :5], full[:, :5], atol=2e-5)
    for i in range(5, L):
        logits, cache = decode(params, packed[:, i : i + 1], jnp.full(2, i), cache)
        np.testing.assert_allclose(logits[:, 0], full[:, i], atol=2e-5)


@pytest.mark.parametrize("chunk", [4, 8])
def test_chunked_losses_and_gradients_equal_the_plain_ones(tokens, chunk):
    batch = {"tokens": jnp.pad(tokens, ((0, 0), (0, 1))), "num_targets": jnp.array([16, 9, 1])}

    def f(params, config):
        losses, weights = llama.base_model(config, seq_len=L).example_losses(params, batch)
        return (losses * weights).sum()

    both = jax.jit(jax.value_and_grad(f), static_argnums=1)
    plain = both(init(), CONFIG)
    cut = both(init(), dataclasses.replace(CONFIG, loss_chunk=chunk))
    np.testing.assert_allclose(plain[0], cut[0], rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), plain[1], cut[1])


@pytest.mark.parametrize("remat", ["full", "dots"])
def test_remat_changes_nothing_but_memory(tokens, remat):
    def f(params, config):
        logits = llama.Llama(config).apply({"params": params}, tokens)
        return jnp.square(logits).mean()

    def num_saved(config):
        jaxpr = jax.make_jaxpr(jax.grad(lambda p: f(p, config)))(init())
        return str(jaxpr).count("remat")

    changed = dataclasses.replace(CONFIG, remat=remat)
    assert num_saved(changed) > num_saved(CONFIG)
    gradient = jax.jit(jax.grad(f), static_argnums=1)
    plain, rematted = (gradient(init(), c) for c in (CONFIG, changed))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), plain, rematted)


def test_padding_targets_weigh_nothing(tokens):
    batch = {"tokens": jnp.pad(tokens, ((0, 0), (0, 1))), "num_targets": jnp.array([16, 3, 0])}
    _, weights = jax.jit(llama.base_model(CONFIG, seq_len=L).example_losses)(init(), batch)
    np.testing.assert_array_equal(weights.sum(1), [16, 3, 0])
    assert (weights[1, :3] == 1).all()


def test_bfloat16_compute_keeps_float32_losses_and_parameters(tokens):
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(init(config))} == {jnp.dtype("float32")}
    logits = forward(config, init(config), tokens)
    assert logits.dtype == jnp.float32
    exact = forward(CONFIG, init(), tokens)
    assert 0 < abs(logits - exact).max() < 0.05


def test_rotation_keeps_length_and_depends_on_distance_only():
    q, k = jax.random.normal(jax.random.key(1), (2, 1, 1, 1, 8))

    def score(i, j):
        at = lambda x, p: llama.rotate(x, jnp.full((1, 1), p), 10_000.0)  # noqa: E731
        return float((at(q, i) * at(k, j)).sum())

    np.testing.assert_allclose(score(3, 1), score(13, 11), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-4


@pytest.mark.parametrize(("dim", "num_layers"), [(32, 2), (64, 12)])
def test_a_token_is_seen_through_all_layers_at_first(dim, num_layers, tokens):
    # Tied, the last norm's output is nearest to the embedding of the position's own token only if
    # the branches add little to it.
    config = dataclasses.replace(CONFIG, dim=dim, num_layers=num_layers)
    nearest = forward(config, init(config), tokens).argmax(axis=-1)
    assert (nearest == tokens).mean() > 0.95


@pytest.mark.parametrize(("preset", "millions"), [("35m", 10.6), ("110m", 85.0), ("335m", 303.0)])
def test_preset_sizes_without_embeddings(preset, millions):
    abstract = jax.eval_shape(build.base_model(base.get_config(preset)).init, jax.random.key(0))
    leaves = tree.flatten(abstract)
    embedding = leaves.pop("embedding")
    assert embedding.shape[0] == 4096
    np.testing.assert_allclose(tree.num_params(leaves) / 1e6, millions, rtol=0.02)


def test_flops_count_the_matmuls_that_xla_counts():
    config = dataclasses.replace(CONFIG, dim=64, num_heads=4, num_kv_heads=4, hidden_dim=128)
    base_model = llama.base_model(config, seq_len=L)
    batch = {"tokens": jnp.zeros((1, L + 1), jnp.int32), "num_targets": jnp.array([L])}
    params = init(dataclasses.replace(config, num_layers=1))
    single = llama.base_model(dataclasses.replace(config, num_layers=1), seq_len=L)
    losses = jax.jit(lambda p: single.example_losses(p, batch)[0].sum())
    counted = losses.lower(params).compile().cost_analysis()["flops"]
    # Ours counts causal attention at half of the square that XLA computes; the rest of the
    # difference is softmax, norms and the like.
    ours = single.flops_per_row / 3
    assert ours < counted < 1.35 * ours
    assert base_model.flops_per_row > single.flops_per_row


class Regression(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


class NnxRegression(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 8, rngs=rngs), nnx.Linear(8, 1, rngs=rngs)])

    def __call__(self, x):
        return self.layers[1](nnx.tanh(self.layers[0](x)))


def squared_error(apply, batch):
    error = jnp.square(apply(batch["x"])[:, 0] - batch["y"])
    return error, jnp.ones_like(error)


@pytest.mark.parametrize(
    "base_model",
    [
        model.from_linen(Regression(), example=jnp.zeros((1, 4)), losses=squared_error),
        model.from_nnx(NnxRegression, losses=squared_error),
    ],
    ids=["linen", "nnx"],
)
def test_any_flax_module_can_be_souped(base_model):
    rng = np.random.default_rng(0)
    config = soup.SoupConfig(num_domains=3, num_experts=2, init_scale=0.5)
    make = functools.partial(
        soup.init, init_base=base_model.init, config=config, frequencies_K=np.full(3, 1 / 3)
    )
    params = jax.jit(make)(jax.random.key(0))
    rows = {"x": jnp.asarray(rng.normal(size=(6, 4)), jnp.float32), "y": jnp.ones(6)}
    batch = soup.Batch(rows=rows, h_MK=jnp.eye(3)[:2])

    def plain(params):
        alpha = soup.coefficients(params, batch.h_MK, config)
        total = 0.0
        for m in range(2):
            theta = jax.tree.map(
                lambda s, e, m=m: s + jnp.tensordot(alpha[m], e, 1),
                params["shared"],
                params["bank"]["dense"],
            )
            own = {k: v[3 * m : 3 * m + 3] for k, v in rows.items()}
            total = total + base_model.example_losses(theta, own)[0].sum()
        return total / 6

    loss, expected = jax.jit(jax.value_and_grad(plain))(params)
    ours = functools.partial(soup.value_and_grad, model=base_model, config=config)
    (ours, _), grads = jax.jit(ours)(params, batch)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
        tree.flatten(expected["shared"]),
        tree.flatten(grads.shared),
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_heads": 3}, "model.num_heads = 3 must divide model.dim = 64"),
        ({"num_kv_heads": 3}, "model.num_kv_heads = 3 must divide model.num_heads = 4"),
        ({"num_heads": 64, "num_kv_heads": 64}, "must be even"),
        ({"loss_chunk": 7}, "model.loss_chunk = 7 must divide seq_len = 256"),
        ({"args": (("depth", 3),)}, "'llama' reads none"),
        ({"kind": "lama"}, r"unknown base network 'lama' \(did you mean llama\?\)"),
        ({"kind": "no_such_package.nets:make"}, "there is no module no_such_package"),
        ({"kind": "soup_jax.tree:no_such"}, "has no attribute no_such"),
        ({"kind": "soup_jax.tree:flatten"}, "returned a dict, and must return a BaseModel"),
        ({"attention_reset": 10_000}, "attention_reset = 10000 is no token"),
    ],
)
def test_networks_that_cannot_be_made_are_refused(fields, message):
    cfg = base.get_config()
    cfg.model.update(fields)
    with pytest.raises(UserError, match=message):
        build.base_model(cfg)


def test_settings_are_the_fields_of_the_config():
    cfg = base.get_config()
    cfg.model.args = (("depth", 3),)
    settings = {"kind": "llama", **dataclasses.asdict(build.model_settings(cfg))}
    assert settings == {**cfg.model, "vocab_size": 4096, "seq_len": 256}


def test_settings_of_an_older_recipe_are_completed_and_unknown_ones_refused():
    old = {"num_layers": 1, "dim": 8, "num_heads": 1, "num_kv_heads": 1, "hidden_dim": 8}
    settings = model.ModelSettings.from_mapping(old, vocab_size=9, seq_len=4)
    assert settings.args == ()
    with pytest.raises(UserError, match=r"unknown fields \['depth'\], missing fields \['dim'\]"):
        model.ModelSettings.from_mapping(
            {k: v for k, v in old.items() if k != "dim"} | {"depth": 3}, vocab_size=9, seq_len=4
        )


def test_modules_with_running_statistics_are_refused():
    module = nn.BatchNorm(use_running_average=False)
    with pytest.raises(UserError, match="merges parameters only"):
        model.from_linen(module, example=jnp.zeros((2, 4)), losses=squared_error).init(
            jax.random.key(0)
        )
