"""Low-rank experts against the same experts multiplied out: merge, gradients, updates, layouts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config
from step_test import make as make_step

from soup_jax import soup, tree
from soup_jax.data import loader
from soup_jax.errors import UserError
from soup_jax.optim import apply as optimizer
from soup_jax.optim.config import schedule
from soup_jax.soup import bank as experts
from soup_jax.soup import low_rank, merge
from soup_jax.training import build

E, M, K = 4, 2, 6
FREQUENCIES = np.full(K, 1 / K)
# Both kinds and none, and matrices with and without a leading dimension.
MIXED = (
    (r"embedding|layers/attention/.*", "low_rank:3"),
    (r"layers/mlp/.*|.*norm/scale", "dense"),
    (".*", "none"),
)
ALL = ((r".*norm/scale", "none"), (".*", "low_rank:3"))


@jax.jit
def perturbed(params, seed=7):
    """With factors that are all nonzero."""
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    new = [(x + 0.1 * jax.random.normal(k, x.shape)).astype(x.dtype) for x, k in zip(leaves, keys)]
    return jax.tree.unflatten(structure, new)


@jax.jit
def multiplied_out(bank, shared):
    """The dense bank of the same experts."""
    leaves = tree.flatten(bank.get("dense", {}))
    for path, factors in experts.by_leaf(bank["low_rank"], shared).items():
        left, right = (factors[side].astype(jnp.float32) for side in ("left", "right"))
        leaves[path] = jnp.matmul(left, right, precision="highest")
    return {"dense": tree.unflatten(leaves)}


@functools.cache
def make(rules=MIXED, **fields):
    cfg = tiny_config(**{"experts.rules": rules} | fields)
    base_model = build.base_model(cfg)
    init = functools.partial(
        soup.init,
        init_base=base_model.init,
        config=build.soup_config(cfg),
        frequencies_K=FREQUENCIES,
    )
    return cfg, base_model, jax.jit(init)(jax.random.key(0))


def make_batch(seed=0, num_mixtures=M):
    rng = np.random.default_rng(seed)
    return soup.Batch(
        rows={
            "tokens": rng.integers(0, 400, (16, 33)).astype(np.int32),
            "num_targets": rng.integers(1, 33, 16).astype(np.int32),
        },
        h_MK=rng.dirichlet(np.ones(K), num_mixtures).astype(np.float32),
        domain_B=np.zeros(16, np.int32),
    )


def close(a, b, tolerance=2e-5):
    a, b = (tree.flatten(jax.device_get(t)) for t in (a, b))  # eager jax compiles by shape
    assert a.keys() == b.keys()
    for path, x in a.items():
        scale = max(float(abs(x).max()), 1e-6)
        np.testing.assert_allclose(x / scale, b[path] / scale, atol=tolerance, err_msg=path)


def test_factors_stand_where_their_leaf_would():
    _, _, params = make()
    shapes = {path: x.shape for path, x in tree.flatten(params["bank"]).items()}
    assert shapes["low_rank/embedding/left"] == (E, 400, 3)
    assert shapes["low_rank/embedding/right"] == (E, 3, 32)
    assert shapes["low_rank/layers/attention/query/left"] == (E, 2, 32, 3)
    assert shapes["dense/layers/mlp/up"] == (E, 2, 32, 48)
    factors = experts.by_leaf(params["bank"]["low_rank"], params["shared"])
    assert "embedding" in factors
    assert all(set(pair) == {"left", "right"} for pair in factors.values())


def test_leaves_of_a_network_may_be_called_left_and_right():
    shared = {"arm": {"left": jnp.ones((4, 5)), "right": jnp.ones((5, 6))}}
    rules = (("arm/left", "low_rank:2"), (".*", "dense"))
    bank = experts.init_bank(jax.random.key(0), shared, num_experts=E, rules=rules, init_scale=0.1)
    paths = {"dense/arm/right", "low_rank/arm/left/left", "low_rank/arm/left/right"}
    assert set(tree.flatten(bank)) == paths
    assert set(experts.by_leaf(bank["low_rank"], shared)) == {"arm/left"}
    bank, alpha_ME = perturbed(bank), jnp.ones((M, E))
    merge_many = jax.jit(merge.merge_many)
    close(
        merge_many(shared, bank, alpha_ME),
        merge_many(shared, multiplied_out(bank, shared), alpha_ME),
    )


def test_the_merged_model_starts_as_the_shared_one():
    _, _, params = make(ALL)
    left = params["bank"]["low_rank"]["embedding"]["left"]
    np.testing.assert_allclose(left.std(), 3**-0.5, rtol=0.05)
    assert not np.allclose(left[0], left[1])
    close(merge.merge(params["shared"], params["bank"], jnp.ones(E)), params["shared"], 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_mixtures", [1, 5])
def test_merge_is_that_of_the_experts_multiplied_out(dtype, num_mixtures):
    _, _, params = make(**{"experts.dtype": dtype})
    bank = perturbed(params["bank"])
    assert {x.dtype for x in jax.tree.leaves(bank)} == {jnp.dtype(dtype)}
    alpha_ME = jax.random.normal(jax.random.key(1), (num_mixtures, E))
    ours = jax.jit(merge.merge_many)(params["shared"], bank, alpha_ME)
    exact = multiplied_out(bank, params["shared"])
    close(ours, jax.jit(merge.merge_many)(params["shared"], exact, alpha_ME))


def plain_loss(params, batch, base_model, config):
    """The definition, with experts multiplied out."""
    alpha_ME = soup.coefficients(params, batch.h_MK, config)
    bank = multiplied_out(params["bank"], params["shared"])
    total, weight = 0.0, 0.0
    for m in range(M):
        theta = merge.merge(params["shared"], bank, alpha_ME[m])
        rows = {k: v[m * 8 : m * 8 + 8] for k, v in batch.rows.items()}
        losses, weights = base_model.example_losses(theta, rows)
        total, weight = total + (losses * weights).sum(), weight + weights.sum()
    return total / weight


@pytest.mark.parametrize("rules", [MIXED, pytest.param(ALL, marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_plain_loss(rules):
    cfg, base_model, params = make(rules)
    config, batch = build.soup_config(cfg), make_batch()
    params = params | {"bank": perturbed(params["bank"])}
    loss, expected = jax.jit(
        jax.value_and_grad(lambda p: plain_loss(p, batch, base_model, config))
    )(params)
    (ours, _), grads = jax.jit(
        lambda p: soup.value_and_grad(p, batch, model=base_model, config=config)
    )(params)
    np.testing.assert_allclose(ours, loss, rtol=1e-5)
    close(grads.shared, expected["shared"])
    close(grads.router, expected["router"])
    close(grads.explicit, {"low_rank": expected["bank"]["low_rank"]})
    merged = tree.flatten(grads.merged)
    for path, g in tree.flatten(expected["bank"].get("dense", {})).items():
        np.testing.assert_allclose(
            jnp.einsum("ME,M...->E...", grads.alpha_ME, merged[path]), g, atol=1e-6
        )
    norms = soup.squared_norms(grads, params["bank"])
    direct = sum(jnp.sum(x**2) for x in jax.tree.leaves(expected["bank"]))
    np.testing.assert_allclose(norms["bank"], direct, rtol=1e-3)


@jax.jit
def random_grads(params, step):
    def like(t, key, *leading):
        leaves, structure = jax.tree.flatten(t)
        keys = jax.random.split(key, len(leaves))
        new = [jax.random.normal(k, (*leading, *x.shape)) for k, x in zip(keys, leaves)]
        return jax.tree.unflatten(structure, new)

    key = jax.random.split(jax.random.key(100 + step), 4)
    merged = like(params["shared"], key[0], M)
    return soup.SoupGrads(
        shared=jax.tree.map(lambda g: g.sum(0), merged),
        router=like(params["router"], key[1]),
        merged=merged,
        alpha_ME=jax.random.normal(key[2], (M, E)),
        explicit={"low_rank": like(params["bank"]["low_rank"], key[3])},
    )


@pytest.mark.parametrize("rules", [MIXED, pytest.param(ALL, marks=pytest.mark.slow)])
def test_updates_of_factors_are_those_of_optax(rules):
    """With decay and clipping, whose norm the dense experts are in."""
    fields = {"optimizer.bank": "adamw", "optimizer.clip_norm": 0.5, "num_steps": 100}
    cfg, _, ours = make(rules, **fields)
    ours = ours | {"bank": perturbed(ours["bank"])}
    config = build.optimizer_config(cfg)
    o, rate = cfg.optimizer, schedule(config)

    def decaying(params):
        return tree.map_named(lambda path, _: "norm/scale" not in path, params)

    def adamw(scale, weight_decay):
        return optax.adamw(
            lambda s: scale * rate(s),
            b1=o.beta1,
            b2=o.beta2,
            eps=o.eps,
            weight_decay=weight_decay,
            mask=decaying,
        )

    parts = {
        "shared": adamw(1.0, o.weight_decay),
        "bank": adamw(o.bank_lr_scale, o.weight_decay),
        "router": adamw(o.router_lr_scale, 0.0),
    }
    plain = optax.chain(
        optax.clip_by_global_norm(0.5), optax.partition(parts, {name: name for name in parts})
    )
    theirs, state, their_state = ours, optimizer.init_state(config, ours), plain.init(ours)
    update = jax.jit(functools.partial(optimizer.apply_update, config))

    @jax.jit
    def reference(params, state, grads):
        merged = tree.flatten(grads.merged)
        dense = {
            path: jnp.einsum("ME,M...->E...", grads.alpha_ME, merged[path])
            for path in tree.flatten(params["bank"].get("dense", {}))
        }
        bank = dict(grads.explicit) | ({"dense": tree.unflatten(dense)} if dense else {})
        full = {"shared": grads.shared, "router": grads.router, "bank": bank}
        updates, state = plain.update(full, state, params)
        return optax.apply_updates(params, updates), state

    for i in range(20):
        grads = random_grads(ours, i)
        ours, state, info = update(ours, state, grads, jnp.asarray(i))
        theirs, their_state = reference(theirs, their_state, grads)
    close(ours, theirs, 1e-5)
    per_expert = jnp.abs(grads.alpha_ME).sum(-1).mean()
    np.testing.assert_allclose(info.effective_rate, 1 + o.bank_lr_scale * per_expert, rtol=1e-6)
    # A gradient that is not finite changes nothing.
    bad = grads._replace(explicit=jax.tree.map(lambda g: g * jnp.nan, grads.explicit))
    after = update(ours, state, bad, jnp.asarray(20))[:2]
    jax.tree.map(np.testing.assert_array_equal, after, (ours, state))


def test_equal_experts_separate():
    """Positive coefficients, as from a softmax, and products that are all zero at the start."""
    cfg, _, params = make(ALL)
    config, alpha_ME = build.optimizer_config(cfg), jnp.full((M, E), 1 / E)
    state = optimizer.init_state(config, params)

    @jax.jit
    def update(params, state, grads, step):
        _, explicit = experts.gradients(grads.merged, params["bank"], alpha_ME)
        grads = grads._replace(alpha_ME=alpha_ME, explicit=explicit)
        return optimizer.apply_update(config, params, state, grads, step)

    for i in range(5):
        params, state, _ = update(params, state, random_grads(params, i), jnp.asarray(i))
    for path, x in tree.flatten(multiplied_out(params["bank"], params["shared"])).items():
        assert float((x.std(0) / abs(x).mean(0)).mean()) > 0.3, path


def test_adam_moves_the_product_by_about_its_rate():
    """Whatever the rank."""
    moved = []
    for rank in (1, 4, 16):
        factors = low_rank.LowRank().init(
            jax.random.key(0),
            "w",
            jnp.zeros((32, 64)),
            num_experts=E,
            argument=str(rank),
            init_scale=0.0,
            dtype="float32",
        )
        step = 0.01 * jnp.sign(jax.random.normal(jax.random.key(1), factors["right"].shape))
        moved.append(float(jnp.std(factors["left"] @ (factors["right"] - step))))
    np.testing.assert_allclose(moved, 0.01, rtol=0.2)


def run(num_devices, steps=3, **fields):
    cfg, m, state, step, sums = make_step(num_devices, **fields)
    for i in range(steps):
        batch = loader.to_device(make_batch(i, cfg.num_mixtures), m)
        state, sums = step(state, sums, batch)
    return state, sums


@pytest.mark.slow
@pytest.mark.parametrize("rules", [MIXED, ALL])
def test_every_mesh_computes_the_same(rules):
    # A larger eps: a rounding difference of a tiny gradient would move a weight by the full rate.
    fields = {"experts.rules": rules, "optimizer.eps": 1e-3, "num_mixtures": 4}
    # 400 = 16 * 25 and 44 = 4 * 11: sizes that are cut by all axes, by one, and by none.
    fields |= {"model.hidden_dim": 44}
    reference, sums = run(1, **fields)
    for count, replica, gather in ((8, 2, "layer"), (8, 4, "step")):
        state, other = run(count, **fields, **{"mesh.replica": replica, "mesh.gather": gather})
        np.testing.assert_allclose(other["loss"], sums["loss"], rtol=1e-5)
        for path, x in tree.flatten(reference.params).items():
            y = tree.flatten(state.params)[path]
            np.testing.assert_allclose(x, y, atol=2e-5, err_msg=path)
    stored = state.params["bank"]["low_rank"]["layers"]["attention"]["query"]["right"]
    assert stored.addressable_shards[0].data.size == stored.size / 8
    moments = tree.flatten(state.opt_state["bank"]["low_rank"])
    nu = next(x for p, x in moments.items() if p.endswith("nu/layers/attention/query/right"))
    assert nu.sharding.is_equivalent_to(stored.sharding, nu.ndim)


@pytest.mark.slow
def test_factors_in_bfloat16_stay_close_to_float32():
    fields = {"experts.rules": MIXED, "optimizer.eps": 1e-3}
    exact, exact_sums = run(1, steps=6, **fields)
    state, sums = run(1, steps=6, **fields, **{"experts.dtype": "bfloat16"})
    np.testing.assert_allclose(sums["loss"], exact_sums["loss"], rtol=1e-3)
    right, want = (
        s.params["bank"]["low_rank"]["layers"]["attention"]["query"]["right"]
        for s in (state, exact)
    )
    assert right.dtype == jnp.bfloat16
    error = np.linalg.norm(np.asarray(right - want, np.float32)) / np.linalg.norm(want)
    assert 0 < error < 0.1
    moments = jax.tree.leaves(state.opt_state["bank"]["low_rank"])
    assert {x.dtype for x in moments} == {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        (((".*", "low_rank:4"),), r"leaf 'final_norm/scale' \(32,\) is no matrix .*'dense' or"),
        (((r"layers/.*", "low_rank:1"), (".*", "none")), r"norm/scale' \(2, 32\) is no matrix"),
        (((r".*/mlp/up", "low_rank:32"), (".*", "none")), r"\(2, 32, 48\): .* less than 32"),
        ((("embedding", "low_rnk:4"), (".*", "none")), r"\(did you mean low_rank\?\)"),
    ],
)
def test_rules_that_do_not_fit_the_leaf_are_refused(rules, message):
    shared = jax.eval_shape(build.base_model(tiny_config()).init, jax.random.key(0))
    with pytest.raises(UserError, match=message):
        experts.init_bank(jax.random.key(0), shared, num_experts=E, rules=rules, init_scale=0.0)


SERVED = (("layers/(attention|mlp)/.*", "low_rank:3"), (".*", "none"))


def test_rows_with_coefficients_of_their_own_are_what_merging_each_gives():
    cfg = tiny_config(**{"experts.rules": SERVED, "model.num_kv_heads": 2})
    model = build.base_model(cfg)
    params = perturbed(
        soup.init(jax.random.key(0), model.init, build.soup_config(cfg), frequencies_K=FREQUENCIES)
    )
    alpha_RE = np.random.default_rng(0).normal(size=(3, E)).astype(np.float32)
    rows = low_rank.unmerged(params["shared"], params["bank"], leaves=model.row_products)
    leaves = jax.tree.leaves(rows, is_leaf=lambda x: isinstance(x, low_rank.Rows))
    assert sum(isinstance(leaf, low_rank.Rows) for leaf in leaves) == 7
    decode = functools.partial(model.decode, cache_len=16)
    token_RL = jnp.asarray(np.random.default_rng(1).integers(0, 400, (3, 9)))
    given = low_rank.with_coefficients(model.decode_params(rows), alpha_RE)
    logits, cache = decode(given, token_RL[:, :8], jnp.zeros(3, jnp.int32), None)
    more, _ = decode(given, token_RL[:, 8:], jnp.full(3, 8), cache)
    together = jnp.concatenate([logits, more], axis=1)
    for row, alpha_E in enumerate(alpha_RE):
        merged = merge.merge(params["shared"], params["bank"], alpha_E)
        alone = model.logits(merged, token_RL[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=2e-5)
    assert abs(together[0] - model.logits(params["shared"], token_RL[:1])[0]).max() > 0.01


@pytest.mark.parametrize(
    ("rules", "num_experts"),
    [(MIXED, E), (ALL, E), (((".*", "dense"),), E), (SERVED, 200), (ALL, 0)],
)
def test_what_is_merged_all_the_same(rules, num_experts):
    # Dense experts, an embedding with experts, factors larger than what they change, no experts.
    cfg = tiny_config(**{"experts.rules": rules, "num_experts": num_experts})
    model = build.base_model(cfg)
    make = functools.partial(
        soup.init, init_base=model.init, config=build.soup_config(cfg), frequencies_K=FREQUENCIES
    )
    params = jax.eval_shape(lambda key: make(key), jax.random.key(0))
    assert low_rank.unmerged(params["shared"], params["bank"], leaves=model.row_products) is None
