import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from soup_jax import soup, tree
from soup_jax.errors import UserError
from soup_jax.optim import apply as optimizer
from soup_jax.optim import shared as shared_optimizers
from soup_jax.optim.config import OptimizerConfig, schedule
from soup_jax.soup import kernels

E, M = 4, 3


def make_config(**fields):
    return OptimizerConfig(**{"learning_rate": 3e-3, "num_steps": 100, "warmup_steps": 10} | fields)


def compiled_update(config):
    return jax.jit(functools.partial(optimizer.apply_update, config))


def make_params(seed=0, num_experts=E):
    key = jax.random.split(jax.random.key(seed), 5)
    shared = {"w": jax.random.normal(key[0], (6, 5)), "norm": {"scale": jnp.ones((2, 5))}}
    bank = {
        "w": 0.1 * jax.random.normal(key[1], (num_experts, 6, 5)),
        "norm": {"scale": 0.1 * jax.random.normal(key[2], (num_experts, 2, 5))},
    }
    router = {"linear": jax.random.normal(key[3], (7, num_experts))}
    return {"shared": shared, "bank": {"dense": bank}, "router": router}


def make_grads(step, num_experts=E):
    key = jax.random.split(jax.random.key(100 + step), 4)
    merged = {
        "w": jax.random.normal(key[0], (M, 6, 5)),
        "norm": {"scale": jax.random.normal(key[1], (M, 2, 5))},
    }
    return soup.SoupGrads(
        shared=jax.tree.map(lambda g: g.sum(0), merged),
        router={"linear": jax.random.normal(key[2], (7, num_experts))},
        merged=merged,
        alpha_ME=jax.random.normal(key[3], (M, num_experts)),
        explicit={},
    )


def multiplied_out(grads):
    """The dense experts' gradient, which no step ever holds."""
    return jax.tree.map(lambda g: jnp.einsum("ME,M...->E...", grads.alpha_ME, g), grads.merged)


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_bank_equals_optax_over_50_steps(clip_norm):
    """The factored path against plain optax on materialised gradients, clipping and decay on."""
    config = make_config(
        bank="adamw",
        bank_lr_scale=0.3,
        router_lr_scale=2.0,
        clip_norm=clip_norm,
        learning_rate=0.01,
    )
    rate = schedule(config)

    def reference(scale, weight_decay):
        return optax.adamw(
            lambda s: scale * rate(s),
            b1=config.beta1,
            b2=config.beta2,
            eps=config.eps,
            weight_decay=weight_decay,
            mask=lambda p: tree.map_named(lambda path, x: path.endswith("w"), p),
        )

    plain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.partition(
            {
                "shared": reference(1.0, config.weight_decay),
                "bank": reference(0.3, config.weight_decay),
                "router": reference(2.0, 0.0),
            },
            {"shared": "shared", "bank": "bank", "router": "router"},
        ),
    )
    ours = theirs = make_params()
    our_state, their_state = optimizer.init_state(config, ours), plain.init(theirs)

    @jax.jit
    def both(ours, our_state, theirs, their_state, grads, step):
        ours, our_state, _ = optimizer.apply_update(config, ours, our_state, grads, step)
        full = {"shared": grads.shared, "router": grads.router}
        full["bank"] = {"dense": multiplied_out(grads)}
        updates, their_state = plain.update(full, their_state, theirs)
        return ours, our_state, optax.apply_updates(theirs, updates), their_state

    for i in range(50):
        ours, our_state, theirs, their_state = both(
            ours, our_state, theirs, their_state, make_grads(i), jnp.asarray(i)
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), ours, theirs)


def test_merged_bank_moves_each_expert_by_its_share_of_the_preconditioned_directions():
    config = make_config(clip_norm=0.0, warmup_steps=0)
    params = make_params()
    state, nu = optimizer.init_state(config, params), np.zeros((6, 5))
    expected = np.asarray(params["bank"]["dense"]["w"], np.float64)
    update, rate = compiled_update(config), schedule(config)
    for i in range(5):
        grads = make_grads(i)
        lr = float(rate(jnp.asarray(i))) * config.bank_lr_scale
        params, state, _ = update(params, state, grads, jnp.asarray(i))
        g = np.asarray(grads.merged["w"], np.float64)
        nu = config.beta2 * nu + (1 - config.beta2) * g.sum(0) ** 2
        direction = g / (np.sqrt(nu / (1 - config.beta2 ** (i + 1))) + config.eps)
        direction = direction.clip(-config.bank_step_bound, config.bank_step_bound)
        expected *= 1 - lr * config.weight_decay
        expected -= lr * np.einsum("me,mij->eij", np.asarray(grads.alpha_ME), direction)
    np.testing.assert_allclose(params["bank"]["dense"]["w"], expected, atol=1e-5)


def test_mixtures_that_cancel_move_no_expert_beyond_the_bound():
    grads = make_grads(0)
    opposite = jax.tree.map(
        lambda g: jnp.stack([g[0], -g[0], 1e-3 * g[2]]), grads.merged
    )  # their sum is a thousandth of each
    grads = grads._replace(merged=opposite, alpha_ME=jnp.eye(M, E))
    moved = {}
    for bound in (0.0, 4.5):
        config = make_config(bank_step_bound=bound, clip_norm=0.0, warmup_steps=0, weight_decay=0.0)
        params = make_params()
        before = params["bank"]["dense"]["w"]
        new, _, _ = compiled_update(config)(
            params, optimizer.init_state(config, params), grads, jnp.asarray(0)
        )
        rate = config.learning_rate * config.bank_lr_scale
        moved[bound] = np.abs(new["bank"]["dense"]["w"] - before).max(axis=(1, 2)) / rate
    assert moved[0.0][:2].min() > 50
    np.testing.assert_allclose(moved[4.5][:2], 4.5, rtol=1e-3)
    np.testing.assert_allclose(moved[4.5][2:], moved[0.0][2:])


def test_merged_bank_has_no_state_per_expert():
    params = make_params()
    state = optimizer.init_state(make_config(bank="merged"), params)["bank"]
    assert tree.num_params(state) == tree.num_params(params["shared"])


def test_equal_experts_separate_under_merged_and_not_under_adamw_with_softmax():
    """Why `merged` is there: Adam ignores the scale of a gradient."""
    alpha = jnp.asarray([[0.1, 0.2, 0.3, 0.4]] * M)  # positive, as from a softmax
    spreads = {}
    for bank in ("merged", "adamw"):
        config = make_config(bank=bank, clip_norm=0.0)
        params = make_params()
        params["bank"] = jax.tree.map(jnp.zeros_like, params["bank"])
        state, update = optimizer.init_state(config, params), compiled_update(config)
        for i in range(5):
            grads = make_grads(i)._replace(alpha_ME=alpha)
            params, state, _ = update(params, state, grads, jnp.asarray(i))
        w = params["bank"]["dense"]["w"]
        spreads[bank] = float((w.std(0) / (abs(w).mean(0) + 1e-12)).mean())
    assert spreads["adamw"] < 1e-3
    assert spreads["merged"] > 0.3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bank", ["adamw", "merged"])
def test_updates_in_blocks_are_those_at_once(bank, dtype):
    """What accelerators run: blocks of 8 experts and a rest of 5; CPUs take all experts at once."""
    config, num_experts, results = make_config(bank=bank), 21, []
    for form in ("cpu", "accelerator"):
        params = make_params(num_experts=num_experts)
        params["bank"] = jax.tree.map(lambda x: x.astype(dtype), params["bank"])
        state = optimizer.init_state(config, params)
        update = compiled_update(config)
        for i in range(6):
            grads = make_grads(i, num_experts)
            with kernels.only(form):
                params, state, _ = update(params, state, grads, jnp.asarray(i))
        results.append(params["bank"]["dense"])
    before = make_params(0, num_experts)["bank"]["dense"]["w"]
    moved = abs(results[0]["w"].astype(jnp.float32) - before)
    assert (moved.max(axis=(1, 2)) > 1e-4).all()  # every expert
    # Of sums that differ in their last bit, stochastic rounding may take either neighbour.
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3}[dtype]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance
        ),
        *results,
    )


@pytest.mark.parametrize("bank", ["adamw", "merged"])
def test_nothing_changes_with_a_bad_gradient(bank):
    config, params = make_config(bank=bank), make_params()
    state, update = optimizer.init_state(config, params), compiled_update(config)
    params, state, info = update(params, state, make_grads(0), jnp.asarray(0))
    assert info.good
    grads = make_grads(1)
    bad = grads._replace(merged=jax.tree.map(lambda g: g * jnp.nan, grads.merged))
    *after, info = update(params, state, bad, jnp.asarray(1))
    assert not info.good
    jax.tree.map(np.testing.assert_array_equal, tuple(after), (params, state))


def rates(**fields):
    config = make_config(**fields)
    rate = jax.jit(jax.vmap(schedule(config)))
    return np.asarray(rate(jnp.arange(config.num_steps + 1)))


def test_schedules():
    peak = {"learning_rate": 1.0, "warmup_steps": 10}
    for kind in ("cosine", "wsd", "constant"):
        lr = rates(**peak, schedule=kind, decay_steps=20)
        assert lr[0] > 0
        assert (np.diff(lr[:11]) > 0).all()
        np.testing.assert_allclose(lr[10], 1.0, rtol=1e-6)
        assert lr.max() <= 1 + 1e-6
        if kind == "wsd":
            np.testing.assert_allclose(lr[10:80], 1.0, rtol=1e-6)
        np.testing.assert_allclose(lr[-1], 1.0 if kind == "constant" else 0.1, rtol=1e-4)


def test_clipping_bounds_the_global_norm_with_the_experts_in_it():
    config = make_config(clip_norm=1.0)
    params, grads = make_params(), make_grads(0)
    state = optimizer.init_state(config, params)
    info = compiled_update(config)(params, state, grads, jnp.asarray(0))[2]
    full = (grads.shared, grads.router, multiplied_out(grads))
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(full), rtol=1e-5)


def test_muon_orthogonalises_each_layer_and_leaves_the_rest_to_adam():
    params = {
        "shared": {
            "embedding": jnp.ones((12, 8)),
            "layers": {"up": jnp.ones((3, 8, 12)), "norm": {"scale": jnp.ones((3, 8))}},
            "final_norm": {"scale": jnp.ones(8)},
        },
        "router": {},
    }
    rng = np.random.default_rng(0)
    grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params)
    # One layer's gradient is a thousand times as large: each is orthogonalised by itself.
    up = grads["shared"]["layers"]["up"]
    grads["shared"]["layers"]["up"] = up.at[0].multiply(1e3)
    config = make_config(shared="muon", learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
    muon = shared_optimizers.shared_optimizer(config)
    ours = jax.jit(lambda g: muon.update(g, muon.init(params), params)[0])(grads)
    updates = tree.flatten(ours["shared"])
    # consistent_rms: 0.2 times the root of the larger dimension.
    singular = np.linalg.svd(updates.pop("layers/up"), compute_uv=False) / (0.2 * 12**0.5)
    assert ((singular > 0.5) & (singular < 1.3)).all()  # five steps of Newton and Schulz
    adam = optax.adam(1.0, b1=config.beta1, b2=config.beta2, eps=config.eps, nesterov=True)
    for path, update in updates.items():
        g = tree.flatten(grads["shared"])[path]
        np.testing.assert_allclose(update, adam.update(g, adam.init(g))[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"shared": "adamv"}, r"unknown optimizer of the shared parameters 'adamv' \(did you mean"),
        ({"shared": "optax.lionn"}, r"'optax.lionn': optax [\d.]+ has no 'lionn'"),
        ({"shared": "optax.lion", "shared_args": (("b5", 1.0),)}, r"\('b5', 1.0\).*'b5'"),
        ({"bank": "adam"}, r"unknown bank optimizer 'adam' \(did you mean adamw\?\)"),
    ],
)
def test_an_optimizer_that_is_not_there_is_named(fields, message):
    with pytest.raises(UserError, match=message):
        optimizer.init_state(make_config(**fields), make_params())
