"""What a compiled step may move, keep and do, whatever the number of experts.

Compiled from shapes alone, on eight CPU devices and, where libtpu is installed (Linux x86-64), by
the TPU compiler for a real slice.
"""

import collections
import importlib.util

import jax
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import tree
from soup_jax.data import loader
from soup_jax.planning import abstract, hlo, target
from soup_jax.soup import Batch
from soup_jax.soup import layout as sharding
from soup_jax.training import build
from soup_jax.training import step as train_step

FEW, MANY = 8, 64
FEWER_MIXTURES_THAN_DEVICES, AS_MANY, MORE = 2, 8, 16
TPU_SIZES = {"model.dim": 128, "model.hidden_dim": 256, "model.dtype": "bfloat16"}
# So many activations that not all fit the chip's vector memory, which does not count.
LARGE = {"vocab_size": 8192, "seq_len": 512, "batch_size": 64}


def tpu_devices(num_slices=1):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: no TPU compiler (it is in the extra [plan])")
    return target.find_target(tiny_config(), topology="v5e:2x4", num_slices=num_slices).devices


def signature(collectives):
    """How often each (kind, shapes, group size) runs: what two programs are compared by."""
    counts = collections.Counter()
    for c in collectives:
        counts[c.kind, c.shapes, c.group_size] += c.times
    return counts


class Compiled:
    """A step for the given devices, its collectives and its memory."""

    def __init__(self, devices, **fields):
        self.cfg = tiny_config(**fields)
        self.step = abstract.abstract_step(self.cfg, build.make_mesh(self.cfg, devices))
        compiled = self.step.compile()
        self.collectives = hlo.collectives(compiled.as_text())
        self.temporaries = compiled.memory_analysis().temp_size_in_bytes

    def moved(self):
        """The signature without alpha's gradient [E, M], the one thing with experts in it, and
        without the gradients' Gram matrix [M, M], which looks the same if M = E."""
        groups, num_experts = build.num_groups(self.cfg), self.cfg.num_experts
        small = {f"f32[{groups},{groups}]", f"f32[{groups},{num_experts}]"}
        small.add(f"f32[{num_experts},{groups}]")
        left = {}
        for (kind, shapes, size), times in signature(self.collectives).items():
            key = (kind, tuple(s for s in shapes if s not in small), size)
            if key[1]:
                left[key] = left.get(key, 0) + times
        return left

    def largest_payload(self):
        return max(c.payload_bytes for c in self.collectives)

    def merged_bytes(self):
        """Of the merged models of a device's group, float32: what a collective may carry."""
        base_size = tree.num_params(self.step.state.params["shared"])
        return 4 * base_size * build.num_groups(self.cfg) // self.step.mesh.shape["replica"]

    def largest_bank_leaf(self):
        return max(
            abstract.device_bytes(x) for x in jax.tree.leaves(self.step.state.params["bank"])
        )


def pair(devices, **fields):
    return [Compiled(devices, num_experts=e, **fields) for e in (FEW, MANY)]


def check_communication(few, many):
    """Collectives carry merged models of a device group and small sums, equally for any E."""
    assert few.collectives
    assert few.moved() == many.moved()
    assert many.largest_payload() <= many.merged_bytes()
    # What grew is alpha's gradient: one sum over devices, or one a leaf where the compiler does
    # not add them up first.
    leaves = len(jax.tree.leaves(many.step.state.params["bank"]))
    grown = [sum(hlo.total_bytes(c.collectives).values()) for c in (few, many)]
    alpha_bytes = 4 * build.num_groups(many.cfg) * (MANY - FEW)
    assert 0 < grown[1] - grown[0] <= 2 * leaves * alpha_bytes


@pytest.mark.slow
def test_communication_does_not_depend_on_the_experts_with_fewer_mixtures_than_devices():
    few, many = pair(jax.devices(), num_mixtures=FEWER_MIXTURES_THAN_DEVICES)
    assert dict(many.step.mesh.shape) == {"replica": 2, "fsdp": 4}
    check_communication(few, many)


@pytest.mark.parametrize("num_mixtures", [AS_MANY, pytest.param(MORE, marks=pytest.mark.slow)])
def test_communication_does_not_depend_on_the_experts(num_mixtures):
    few, many = pair(jax.devices(), num_mixtures=num_mixtures)
    check_communication(few, many)
    # A group is one device: an all-to-all of each merged leaf there and one of its gradient back.
    leaves = len(jax.tree.leaves(many.step.state.params["shared"]))
    kinds = [c.kind for c in many.collectives]
    assert kinds.count("all-to-all") == 2 * leaves
    assert set(kinds) == {"all-to-all", "all-reduce"}


LOW_RANK = ((r"layers/(attention|mlp)/.*", "low_rank:4"), (".*", "none"))


def test_what_low_rank_experts_move():
    """The smaller factor of each leaf, gathered, and its gradient, back to slices."""
    few, many = (
        Compiled(jax.devices(), num_mixtures=AS_MANY, num_experts=e, **{"experts.rules": LOW_RANK})
        for e in (FEW, MANY)
    )
    bank = tree.flatten(many.step.state.params["bank"]["low_rank"])
    pairs = [(x, bank[p[:-4] + "right"]) for p, x in bank.items() if p.endswith("/left")]
    smaller = [4 * min(left.size, right.size) for left, right in pairs]
    sent = hlo.total_bytes(many.collectives)
    for kind in ("all-gather", "reduce-scatter"):
        found = [c for c in many.collectives if c.kind == kind]
        assert len(found) == len(pairs)
        assert max(c.payload_bytes for c in found) <= max(smaller)
        assert sent[kind] == sum(smaller) * 7 / 8
    # The rest is as of dense experts.
    leaves = len(jax.tree.leaves(many.step.state.params["shared"]))
    exchanged = [
        {key: n for key, n in signature(c.collectives).items() if key[0] == "all-to-all"}
        for c in (few, many)
    ]
    assert exchanged[0] == exchanged[1]
    assert sum(exchanged[0].values()) == 2 * leaves
    assert {c.kind for c in many.collectives} <= {
        "all-gather",
        "all-reduce",
        "all-to-all",
        "reduce-scatter",
    }
    assert sent["all-reduce"] < 16 * MANY * AS_MANY * len(pairs)


def test_accumulated_gradients_lie_on_slices():
    """Micro-batches cost a second set of gradients in slices, not a whole one in float32."""
    fields = {"num_mixtures": FEWER_MIXTURES_THAN_DEVICES, "model.dim": 256, "batch_size": 32}
    fields |= {"seq_len": 8, "mesh.gather": "layer", "model.remat": "full"}
    one, two = (
        Compiled(jax.devices(), **fields, **{"optimizer.grad_accumulation": n}) for n in (1, 2)
    )
    assert two.temporaries - one.temporaries < 0.7 * one.merged_bytes()


@pytest.mark.parametrize("bank", ["merged", pytest.param("adamw", marks=pytest.mark.slow)])
def test_cpu_step_keeps_no_second_bank(bank):
    """In float32: of a bfloat16 bank a CPU makes float32 copies to multiply."""
    fields = {"model.dim": 128, "optimizer.bank": bank}
    few, many = pair(jax.devices(), num_mixtures=AS_MANY, **fields)
    assert many.temporaries - few.temporaries < many.largest_bank_leaf()


def check_tpu(devices, leaves=1, **fields):
    few, many = pair(devices, **TPU_SIZES | fields)
    check_communication(few, many)
    assert many.temporaries - few.temporaries < leaves * many.largest_bank_leaf()
    sums = [c for c in many.collectives if c.kind == "all-reduce" and not c.in_loop]
    return few, many, sums


def test_tpu_step_moves_merged_models_and_small_sums_only():
    _, many, sums = check_tpu(tpu_devices(), num_mixtures=MORE)
    kinds = [c.kind for c in many.collectives]
    assert kinds.count("all-to-all") == 2 * len(jax.tree.leaves(many.step.state.params["shared"]))
    assert set(kinds) == {"all-to-all", "all-reduce"}
    assert sum(c.payload_bytes for c in sums) < 16 * MANY * MORE


@pytest.mark.slow
@pytest.mark.parametrize(("num_mixtures", "replica"), [(MORE, 16), (4, 4)])
def test_what_crosses_slices_is_merged_models_whatever_the_experts(num_mixtures, replica):
    fields = {"num_mixtures": num_mixtures, **TPU_SIZES, **LARGE}
    few, many = pair(tpu_devices(num_slices=2), **fields)
    assert many.step.mesh.shape["replica"] == replica
    large = [
        [c for c in one.collectives if c.num_slices > 1 and c.kind == "all-to-all"]
        for one in (few, many)
    ]
    assert signature(large[0]) == signature(large[1])
    # Half of each merged leaf of a device's mixtures comes from the other slice, in bfloat16, and
    # half of its gradient goes back.
    base_size = tree.num_params(many.step.state.params["shared"])
    per_device = 2 * base_size * build.num_groups(many.cfg) / many.step.mesh.size
    crossing = sum(c.crossing_bytes for c in large[1])
    assert crossing == pytest.approx(2 * per_device / 2, rel=0.01)
    rest = [sum(c.crossing_bytes for c in one.collectives) for one in (few, many)]
    leaves = len(jax.tree.leaves(many.step.state.params["bank"]))
    assert rest[1] - rest[0] <= 2 * 4 * leaves * num_mixtures * (MANY - FEW)


@pytest.mark.slow
@pytest.mark.parametrize("bank", ["merged", "adamw"])
def test_tpu_step_keeps_no_second_bank(bank):
    fields = {"num_mixtures": MORE, "optimizer.bank": bank}
    # With AdamW the compiler keeps a leaf's moments in the layout of the product that updates them.
    # The one that comes with jax 0.12 does so for more leaves at a time: 4.7 were measured.
    newer = tuple(map(int, jax.__version__.split(".")[:2])) >= (0, 12)
    leaves = (5 if newer else 2) if bank == "adamw" else 1
    few, many, _ = check_tpu(tpu_devices(), leaves, **LARGE, **fields)
    assert min(few.temporaries, many.temporaries) > 0


@pytest.mark.slow
@pytest.mark.parametrize("num_mixtures", [FEWER_MIXTURES_THAN_DEVICES, AS_MANY])
def test_tpu_step_with_other_numbers_of_mixtures(num_mixtures):
    check_tpu(tpu_devices(), num_mixtures=num_mixtures, **LARGE)


def test_bank_sized_traffic_is_seen():
    """The layout that must not be, the bank split along the experts, is over the limit."""
    many = Compiled(jax.devices(), num_experts=MANY, num_mixtures=AS_MANY)
    spec = jax.sharding.PartitionSpec(("replica", "fsdp"))
    split = jax.sharding.NamedSharding(many.step.mesh, spec)
    params = dict(many.step.state.params)
    params["bank"] = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split), params["bank"]
    )
    state = many.step.state._replace(params=params)
    lowered = many.step.function.lower(state, many.step.metrics, many.step.batch)
    many.collectives = hlo.collectives(lowered.compile().as_text())
    assert many.largest_payload() > many.merged_bytes()


def test_no_transfer_between_host_and_device_inside_the_steps():
    cfg = tiny_config(num_mixtures=8)
    step = abstract.abstract_step(cfg, build.make_mesh(cfg))
    where = jax.tree.map(lambda leaf: leaf.sharding, step.state)
    state = jax.jit(
        lambda: jax.tree.map(lambda leaf: jax.numpy.ones(leaf.shape, leaf.dtype), step.state),
        out_shardings=where,
    )()
    everywhere = sharding.replicated(step.mesh)
    sums = jax.device_put(train_step.zero_metrics(cfg.num_domains), everywhere)
    host = Batch(
        rows={
            "tokens": np.ones((cfg.batch_size, cfg.seq_len + 1), np.int32),
            "num_targets": np.full(cfg.batch_size, cfg.seq_len, np.int32),
        },
        domain_B=np.zeros(cfg.batch_size, np.int32),
        h_MK=np.full((cfg.num_mixtures, cfg.num_domains), 1 / cfg.num_domains, np.float32),
    )
    batch = loader.to_device(host, step.mesh)
    with jax.transfer_guard("disallow"):
        for _ in range(3):
            state, sums = step.function(state, sums, batch)
        with pytest.raises(Exception, match=r"[Dd]isallowed host-to-device"):
            step.function(state, sums, host)
    assert float(sums["steps"]) == 3
