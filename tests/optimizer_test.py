import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from soup_jax import tree
from soup_jax.experiments import base
from soup_jax.optim import apply as optimizer
from soup_jax.soup import bank as experts
from soup_jax.soup import gradients as soup
from soup_jax.soup import merge

E, M = 4, 3


def make_config(**fields):
    cfg = base.get_config()
    cfg.update_from_flattened_dict({"num_experts": E, "num_mixtures": M, "num_steps": 100} | fields)
    return cfg


def compiled_update(cfg):
    return jax.jit(functools.partial(optimizer.apply_update, cfg))


def make_params(seed=0, num_experts=E):
    key = jax.random.split(jax.random.key(seed), 5)
    shared = {"w": jax.random.normal(key[0], (6, 5)), "norm": {"scale": jnp.ones((2, 5))}}
    bank = {
        "w": 0.1 * jax.random.normal(key[1], (num_experts, 6, 5)),
        "norm": {"scale": 0.1 * jax.random.normal(key[2], (num_experts, 2, 5))},
    }
    router = {"linear": jax.random.normal(key[3], (7, num_experts))}
    return {"shared": shared, "bank": bank, "router": router}


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
        factors={},
    )


@pytest.mark.parametrize("clip_norm", [0.0, 0.5])
def test_adamw_bank_equals_optax_over_50_steps(clip_norm):
    """The factored path against plain optax on materialised gradients, clipping and decay on."""
    cfg = make_config(
        **{
            "optimizer.bank": "adamw",
            "optimizer.bank_lr_scale": 0.3,
            "optimizer.router_lr_scale": 2.0,
            "optimizer.clip_norm": clip_norm,
            "optimizer.learning_rate": 0.01,
        }
    )
    o, rate = cfg.optimizer, optimizer.schedule(cfg)

    def reference(scale, weight_decay):
        return optax.adamw(
            lambda s: scale * rate(s),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=weight_decay,
            mask=lambda p: tree.map_named(lambda path, x: path.endswith("w"), p),
        )

    plain = optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.partition(
            {
                "shared": reference(1.0, o.weight_decay),
                "bank": reference(0.3, o.weight_decay),
                "router": reference(2.0, 0.0),
            },
            {"shared": "shared", "bank": "bank", "router": "router"},
        ),
    )
    ours = theirs = make_params()
    our_state, their_state = optimizer.init_state(cfg, ours), plain.init(theirs)
    update = jax.jit(lambda p, s, g, i: optimizer.apply_update(cfg, p, s, g, i)[:2])
    for i in range(50):
        grads = make_grads(i)
        full = {
            "shared": grads.shared,
            "router": grads.router,
            "bank": jax.tree.map(
                lambda g, a=grads.alpha_ME: jnp.einsum("ME,M...->E...", a, g), grads.merged
            ),
        }
        ours, our_state = update(ours, our_state, grads, jnp.asarray(i))
        updates, their_state = plain.update(full, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), ours, theirs)


def test_merged_bank_moves_each_expert_by_its_share_of_the_preconditioned_directions():
    cfg = make_config(**{"optimizer.clip_norm": 0.0, "optimizer.warmup_steps": 0})
    o, params = cfg.optimizer, make_params()
    state, nu = optimizer.init_state(cfg, params), np.zeros((6, 5))
    expected = np.asarray(params["bank"]["w"], np.float64)
    update = compiled_update(cfg)
    for i in range(5):
        grads = make_grads(i)
        lr = float(optimizer.schedule(cfg)(jnp.asarray(i))) * o.bank_lr_scale
        params, state, _ = update(params, state, grads, jnp.asarray(i))
        g = np.asarray(grads.merged["w"], np.float64)
        nu = o.beta2 * nu + (1 - o.beta2) * g.sum(0) ** 2
        direction = g / (np.sqrt(nu / (1 - o.beta2 ** (i + 1))) + o.eps)
        expected *= 1 - lr * o.weight_decay
        expected -= lr * np.einsum("me,mij->eij", np.asarray(grads.alpha_ME), direction)
    np.testing.assert_allclose(params["bank"]["w"], expected, atol=1e-5)


def test_merged_bank_has_no_state_per_expert():
    cfg = make_config(**{"optimizer.bank": "merged"})
    params = make_params()
    state = optimizer.init_state(cfg, params)["bank"]
    assert tree.num_params(state) == tree.num_params(params["shared"])


def test_equal_experts_separate_under_merged_and_not_under_adamw_with_softmax():
    """Why `merged` is there: Adam ignores the scale of a gradient."""
    alpha = jnp.asarray([[0.1, 0.2, 0.3, 0.4]] * M)  # positive, as from a softmax
    spreads = {}
    for bank in ("merged", "adamw"):
        cfg = make_config(**{"optimizer.bank": bank, "optimizer.clip_norm": 0.0})
        params = make_params()
        params["bank"] = jax.tree.map(jnp.zeros_like, params["bank"])
        state, update = optimizer.init_state(cfg, params), compiled_update(cfg)
        for i in range(5):
            grads = make_grads(i)._replace(alpha_ME=alpha)
            params, state, _ = update(params, state, grads, jnp.asarray(i))
        w = params["bank"]["w"]
        spreads[bank] = float((w.std(0) / (abs(w).mean(0) + 1e-12)).mean())
    assert spreads["adamw"] < 1e-3
    assert spreads["merged"] > 0.3


@pytest.mark.parametrize("flush_every", [2, 3, 7])
def test_deferred_updates_equal_eager_ones(flush_every):
    """With decay and clipping; read through what is pending at every step, then flushed. 3 and 7
    do not divide the number of experts."""
    options = {"optimizer.clip_norm": 0.5, "optimizer.learning_rate": 0.01}
    eager_cfg = make_config(**options)
    cfg = make_config(**options, **{"optimizer.flush_every": flush_every})
    eager = deferred = make_params()
    eager_state, state = optimizer.init_state(eager_cfg, eager), optimizer.init_state(cfg, deferred)
    update, update_eager = compiled_update(cfg), compiled_update(eager_cfg)

    @jax.jit
    def seen(params, state, grads, alpha_ME):
        """What merges and coefficients' gradients make of the experts."""
        pending = optimizer.pending(cfg, state) if "directions" in state["bank"] else None
        bank = params["bank"]
        theta_M = merge.merge_many(params["shared"], bank, alpha_ME, pending=pending)
        return theta_M, soup.coefficient_gradient(grads.merged, bank, alpha_ME, pending=pending)

    for i in range(3 * flush_every + 1):
        grads = make_grads(i)
        eager, eager_state, _ = update_eager(eager, eager_state, grads, jnp.asarray(i))
        deferred, state, _ = update(deferred, state, grads, jnp.asarray(i))
        other = make_grads(1000 + i)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4),
            seen(eager, eager_state, other, other.alpha_ME),
            seen(deferred, state, other, other.alpha_ME),
        )
    assert float(abs(deferred["bank"]["w"] - eager["bank"]["w"]).max()) > 1e-4  # something pends
    flushed, state = optimizer.flush(cfg, deferred, state, jnp.asarray(99))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), flushed, eager)
    again, _ = optimizer.flush(cfg, flushed, state, jnp.asarray(100))
    jax.tree.map(np.testing.assert_array_equal, again, flushed)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fields", [{"bank": "adamw"}, {"bank": "merged"}, {"flush_every": 4}])
def test_updates_in_blocks_are_those_at_once(fields, dtype, monkeypatch):
    """What accelerators run: blocks of 8 experts and a rest of 5; CPUs take all experts at once."""
    num_experts = 21
    fields = {f"optimizer.{name}": value for name, value in fields.items()}
    cfg = make_config(num_experts=num_experts, **fields, **{"experts.dtype": dtype})
    results = []
    for fused_terms in (experts._FUSED_TERMS, 0):
        monkeypatch.setattr(experts, "_FUSED_TERMS", fused_terms)
        params = make_params(num_experts=num_experts)
        params["bank"] = jax.tree.map(lambda x: x.astype(dtype), params["bank"])
        state = optimizer.init_state(cfg, params)
        update = compiled_update(cfg)
        for i in range(6):
            grads = make_grads(i, num_experts)
            params, state, _ = update(params, state, grads, jnp.asarray(i))
        flush = jax.jit(functools.partial(optimizer.flush, cfg))
        results.append(flush(params, state, jnp.asarray(6))[0]["bank"])
    moved = abs(results[0]["w"].astype(jnp.float32) - make_params(0, num_experts)["bank"]["w"])
    assert (moved.max(axis=(1, 2)) > 1e-4).all()  # every expert
    # Of sums that differ in their last bit, stochastic rounding may take either neighbour.
    tolerance = {"float32": 1e-6, "bfloat16": 4e-3}[dtype]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), atol=tolerance
        ),
        *results,
    )


def test_nothing_changes_with_a_bad_gradient_when_updates_are_deferred():
    cfg = make_config(**{"optimizer.flush_every": 3})
    params = make_params()
    state, update = optimizer.init_state(cfg, params), compiled_update(cfg)
    for i in range(4):
        params, state, _ = update(params, state, make_grads(i), jnp.asarray(i))
    grads = make_grads(4)
    bad = grads._replace(merged=jax.tree.map(lambda g: g * jnp.nan, grads.merged))
    after = update(params, state, bad, jnp.asarray(4))[:2]
    jax.tree.map(np.testing.assert_array_equal, after, (params, state))


def test_norm_scales_and_biases_do_not_decay():
    assert optimizer.decays("layers/mlp/up", 3)
    assert not optimizer.decays("layers/mlp_norm/scale", 2)
    assert not optimizer.decays("final_norm/scale", 1)
    assert not optimizer.decays("hidden_bias", 2)


def rates(cfg):
    return np.array([optimizer.schedule(cfg)(s) for s in range(cfg.num_steps + 1)])


def test_schedules():
    options = {"optimizer.learning_rate": 1.0, "optimizer.warmup_steps": 10}
    for kind in ("cosine", "wsd", "constant"):
        lr = rates(make_config(**options, **{"optimizer.schedule": kind}))
        assert lr[0] > 0
        assert (np.diff(lr[:11]) > 0).all()
        np.testing.assert_allclose(lr[10], 1.0, rtol=1e-6)
        assert lr.max() <= 1 + 1e-6
    cosine = rates(make_config(**options))
    np.testing.assert_allclose(cosine[-1], 0.1, rtol=1e-4)
    wsd = rates(
        make_config(**options, **{"optimizer.schedule": "wsd", "optimizer.decay_steps": 20})
    )
    np.testing.assert_allclose(wsd[10:80], 1.0, rtol=1e-6)
    np.testing.assert_allclose(wsd[-1], 0.1, rtol=1e-4)


def test_clipping_bounds_the_global_norm_with_the_experts_in_it():
    cfg = make_config(**{"optimizer.clip_norm": 1.0})
    params, grads = make_params(), make_grads(0)
    info = compiled_update(cfg)(params, optimizer.init_state(cfg, params), grads, jnp.asarray(0))[2]
    bank = jax.tree.map(lambda g: jnp.einsum("ME,M...->E...", grads.alpha_ME, g), grads.merged)
    full = (grads.shared, grads.router, bank)
    np.testing.assert_allclose(info.grad_norm, optax.tree.norm(full), rtol=1e-5)
