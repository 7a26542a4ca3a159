"""Kinds of experts and optimizers that a config names by a dotted path train on a mesh."""

import jax
import numpy as np
import pytest
from step_test import make, make_batch

from soup_jax import tree
from soup_jax.optim.config import schedule
from soup_jax.soup import merge
from soup_jax.training import build


def two_steps(**fields):
    """(config, state before, state after) of two steps on eight devices."""
    cfg, m, state, step, sums = make(**fields)
    before = jax.tree.map(np.array, state)
    for i in range(2):
        state, sums = step(state, sums, make_batch(cfg, m, i))
    assert int(state.step) == 2
    assert np.isfinite(float(sums["loss"]))
    return cfg, before, state


def moves(before, after):
    """Path -> how far each leaf moved."""
    after = tree.flatten(after)
    return {path: np.asarray(after[path]) - x for path, x in tree.flatten(before).items()}


@pytest.fixture(scope="module")
def outside():
    """Three things of tests/outside.py in one step, and dense experts beside those of Offset."""
    rules = (("layers/mlp/.*", "outside:Offset:0.5"), (".*", "dense"))
    return two_steps(
        **{
            "experts.rules": rules,
            "optimizer.bank": "outside:Sgd",
            "optimizer.shared": "outside:momentum",
            "optimizer.shared_args": (("decay", 0.5),),
            "optimizer.clip_norm": 0.0,
        }
    )


def test_a_kind_of_experts_by_a_dotted_path(outside):
    _, before, after = outside
    assert set(after.params["bank"]) == {"outside:Offset", "dense"}
    part = after.params["bank"]["outside:Offset"]
    assert set(tree.flatten(part)) == {"layers/mlp/gate", "layers/mlp/up", "layers/mlp/down"}
    up = part["layers"]["mlp"]["up"]
    assert up.shape == (4, 1, 1, 48)
    assert up.sharding.spec[-1] == ("fsdp", "replica")
    for path, move in moves(before.params["bank"]["outside:Offset"], part).items():
        assert (abs(move) > 0).all(), path  # Adam
    shared, alpha_E = after.params["shared"], np.arange(4.0, dtype=np.float32)
    merged = merge.merge(shared, after.params["bank"], alpha_E)
    np.testing.assert_allclose(
        merged["layers"]["mlp"]["up"],
        shared["layers"]["mlp"]["up"] + np.einsum("e,elab->lab", alpha_E, up),
        atol=1e-5,
    )


def test_a_bank_optimizer_by_a_dotted_path(outside):
    _, before, after = outside
    state = after.opt_state["bank"]["dense"]
    assert int(state["count"]) == 2
    assert state["count"].sharding.is_fully_replicated
    for path, move in moves(before.params["bank"]["dense"], after.params["bank"]["dense"]).items():
        assert abs(move).max() > 0, path


def test_an_optimizer_of_the_shared_parameters_by_a_dotted_path(outside):
    _, before, after = outside
    for path, move in moves(before.params["shared"], after.params["shared"]).items():
        assert abs(move).max() > 0, path
    # Its momentum is stored in slices, like the parameters.
    traces = [x for x in jax.tree.leaves(after.opt_state["base"]) if x.shape == (2, 32, 48)]
    assert len(traces) == 2  # gate and up
    assert {x.addressable_shards[0].data.size for x in traces} == {2 * 32 * 48 // 8}


def test_an_optimizer_of_optax_by_its_name():
    args = (("weight_decay", 0.0),)
    fields = {"optimizer.shared": "optax.lion", "optimizer.shared_args": args}
    cfg, before, after = two_steps(**fields)
    rate = schedule(build.optimizer_config(cfg))
    first, second = float(rate(0)), float(rate(1))
    for path, move in moves(before.params["shared"], after.params["shared"]).items():
        # Lion moves every number by the rate, there or back.
        if path != "embedding":  # words that the batch lacks have no gradient
            steps = [abs(second - first), first + second]
            distance = np.abs(np.abs(move)[..., None] - steps).min(-1)
            assert distance.max() < 1e-6, path
