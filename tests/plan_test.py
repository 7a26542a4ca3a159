"""Plans: their numbers against the real state, what they print, and how they fail."""

import dataclasses
import importlib.util
import json
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import tiny_config

from soup_jax import tree
from soup_jax.cli import main
from soup_jax.errors import UserError
from soup_jax.hardware import chips, mesh
from soup_jax.planning import abstract, hlo, plan, roofline, target, text
from soup_jax.training import build
from soup_jax.training import state as train_state

H200 = chips.find("H200")
NEEDS_LIBTPU = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)


def test_chips_are_found_by_name_and_by_kind():
    assert chips.find("h200").memory_gb == 141
    assert chips.from_kind("TPU v5 lite").name == "v5e"
    assert chips.from_kind("TPU v5").name == "v5p"
    assert chips.from_kind("NVIDIA A100-SXM4-40GB").name == "A100-40GB"
    assert chips.from_kind("NVIDIA A100-SXM4-80GB").name == "A100-80GB"
    assert chips.from_kind("NVIDIA H100 80GB HBM3") == chips.find("H100-SXM") == chips.find("H100")
    assert chips.from_kind("NVIDIA H100 PCIe").memory_gbs == chips.find("H100-pcie").memory_gbs
    assert chips.find("nvidia gh200 480gb").memory_gb == 96
    # Relatives of known ones are not taken for them.
    for kind in ("cpu", "NVIDIA H100", "NVIDIA H200 X", "NVIDIA A100", "NVIDIA H20", "TPU v5 x"):
        assert chips.from_kind(kind) is None
    assert H200.exchange_gbs(8) == 450
    assert H200.exchange_gbs(16) == 50
    with pytest.raises(UserError, match="unknown chip 'H20'; known are v4, v5e"):
        chips.find("H20")
    with pytest.raises(UserError, match="A100-40GB, A100-80GB"):
        chips.find("A100")


def test_no_two_chips_share_a_name():
    names = [name.lower() for chip in chips.CHIPS for name in {n.lower() for n in chip.all_names}]
    assert len(names) == len(set(names))


def small_step(**fields):
    cfg = tiny_config(**fields)
    return cfg, abstract.abstract_step(cfg, build.make_mesh(cfg, jax.devices()))


@pytest.mark.parametrize("bank", ["merged", "adamw"])
def test_state_bytes_are_those_of_the_real_state(bank):
    cfg, step = small_step(num_mixtures=4, **{"optimizer.bank": bank})
    init = train_state.make_init(
        build.soup_config(cfg),
        build.optimizer_config(cfg),
        build.base_model(cfg),
        seed=cfg.seed,
        frequencies_K=np.full(cfg.num_domains, 1 / cfg.num_domains),
    )
    where = jax.tree.map(lambda leaf: leaf.sharding, step.state)
    state = jax.jit(init, out_shardings=where)()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state))
    counted = abstract.state_bytes(step)
    rest = counted.pop("batch and metrics")
    counters = 8  # step and bad_step
    assert sum(counted.values()) == held - counters
    assert rest > 0
    bank_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state.params["bank"]))
    assert bank_bytes / 8 <= counted["bank"] < 1.05 * bank_bytes / 8


def test_flops_and_traffic_of_the_bank():
    cfg, step = small_step(num_mixtures=4)
    bank = tree.num_params(step.state.params["bank"])
    flops = roofline.step_flops(cfg, step)
    assert flops["merge, alpha's gradient and bank update"] == 6 * 4 * bank
    assert flops["base network"] == step.model.flops_per_row * 16
    adamw_cfg, adamw = small_step(num_mixtures=4, **{"optimizer.bank": "adamw"})
    grown = roofline.bank_traffic(adamw_cfg, adamw) - roofline.bank_traffic(cfg, step)
    # Two moments are read twice and written, less the one of a single model.
    bank, one = (abstract.device_bytes(step.state.params[name]) for name in ("bank", "shared"))
    assert grown == pytest.approx(6 * bank - 2 * one, rel=0.02)


@pytest.mark.parametrize(("bank", "passes"), [("merged", 4), ("adamw", 10)])
def test_passes_over_the_bank_are_those_of_the_compiled_step(bank, passes):
    # Few experts, as the compiler counts a loop over blocks once; one small leaf has them.
    fields = {"optimizer.bank": bank, "batch_size": 2, "num_mixtures": 1, "model.num_layers": 1}
    fields |= {"experts.rules": (("layers/mlp/up", "dense"), (".*", "none")), "seq_len": 16}
    fields |= {"model.hidden_dim": 512}
    moved, held = [], []
    for num_experts in (4, 8):
        cfg = tiny_config(num_experts=num_experts, **fields)
        step = abstract.abstract_step(cfg, build.make_mesh(cfg, jax.devices()[:1]))
        moved.append(step.compile().cost_analysis()["bytes accessed"])
        held.append(abstract.state_bytes(step)["bank"])
    counted = roofline.bank_passes(cfg)
    of_size = 2 * (bank == "adamw")
    assert counted["bank"] + of_size * counted["moments"] == passes
    assert (moved[1] - moved[0]) / (held[1] - held[0]) == pytest.approx(passes, rel=0.1)


def test_flops_of_low_rank_experts_are_their_ranks_times_those_of_dense_ones():
    flops = {}
    for rule in ("dense", "low_rank:5"):
        rules = ((".*/mlp/.*", rule), (".*", "none"))
        cfg, step = small_step(**{"experts.rules": rules})
        flops[rule] = roofline.step_flops(cfg, step)["merge, alpha's gradient and bank update"]
    assert flops["low_rank:5"] == 5 * flops["dense"]
    # Bytes are those of the factors and of Adam's two moments, on eight devices.
    parts, bank = abstract.state_bytes(step), tree.num_bytes(step.state.params["bank"])
    assert parts["bank"] == pytest.approx(bank / 8, rel=0.01)
    assert parts["moments of the bank"] == pytest.approx(2 * bank / 8, rel=0.01)


def test_roofline_is_bounded_by_its_parts():
    cfg, step = small_step()
    r = roofline.roofline(cfg, step, H200, moved=450e9)
    assert r["exchange"] == 1.0
    assert r["seconds_at_least"] == max(r["compute"], r["bank"], r["exchange"])
    assert r["seconds_in_turn"] == r["compute"] + r["bank"] + r["exchange"]
    assert 0 < r["mfu"] < 1


def test_changes_save_state_exactly_or_are_named_without_a_number():
    fields = {"optimizer.bank": "adamw", "num_experts": 64}
    cfg, step = small_step(**fields)
    changes = {change.field: change for change in plan.changes(cfg, step)}
    parts = abstract.state_bytes(step)
    merged_cfg, merged = small_step(num_experts=64)
    saved = parts["moments of the bank"] - abstract.state_bytes(merged)["moments of the bank"]
    assert changes["optimizer.bank"].saves == saved
    assert changes["experts.dtype"].saves == parts["bank"] / 2
    assert str(changes["optimizer.bank"]) == "--config.optimizer.bank=merged"
    assert changes["model.remat"].saves == 0
    assert "optimizer.bank" not in {c.field for c in plan.changes(merged_cfg, merged)}


def test_merged_models_of_layers_gathered_one_at_a_time():
    fields = {"num_mixtures": 2, "model.num_layers": 4}
    cfg, step = small_step(**fields)
    scalars = tree.num_params(step.state.params["shared"])
    merged = abstract.merged_bytes(cfg, step)
    assert merged["merged models"] == 4 * scalars  # one of two on either half of the devices
    assert merged["their gradients in float32 slices"] == 4 * 2 * scalars // 8
    layer_cfg, layer_step = small_step(**fields, **{"mesh.gather": "layer"})
    layers = tree.num_params(step.state.params["shared"]["layers"])
    fewer = abstract.merged_bytes(layer_cfg, layer_step)["merged models"]
    assert fewer == 4 * (scalars - layers + layers // 4 + layers // 4)


def test_a_network_that_says_nothing_of_itself(approximate):
    cfg = tiny_config(num_mixtures=8)
    silent = dataclasses.replace(build.base_model(cfg), flops_per_row=0.0, layers="")
    where = target.find_target(cfg, chip="H200", num_devices=8)
    made = plan.make_plan(cfg, where, model=silent)
    assert made.state == approximate.state
    assert made.roofline["mfu"] is None
    printed = text.to_text(made)
    assert "recomputation included    not known" in printed
    assert "MFU" not in printed
    assert "UNEXPECTED" not in printed


@pytest.fixture(scope="module")
def approximate():
    """A plan for GPUs that are not here."""
    cfg = tiny_config(num_mixtures=8)
    return plan.make_plan(cfg, target.find_target(cfg, chip="H200", num_devices=8))


@pytest.mark.parametrize(("rate", "told"), [(3.125, "at 3.125 GB/s"), (0.0, "at a rate not known")])
def test_a_plan_says_what_crosses_slices_and_at_what_rate(approximate, rate, told):
    over = hlo.Collective("all-to-all", ("f32[1000000]",), 4_000_000, 16, num_slices=2)
    made = dataclasses.replace(approximate, collectives=[over], network_gbs=rate)
    (line,) = [x for x in text.to_text(made).splitlines() if "of it to other slices" in x]
    assert line.split(maxsplit=5)[5] == f"2.000  {told}"
    assert text.to_json(made)["collectives"][0]["crossing_bytes"] == 2e6


@pytest.mark.parametrize(("network", "seconds"), [(2.0, 2.5), (0.0, None)])
def test_what_crosses_slices_takes_the_time_of_the_network(network, seconds):
    cfg = tiny_config(num_mixtures=8)
    step = abstract.abstract_step(cfg, build.make_mesh(cfg))
    chip = dataclasses.replace(chips.find("v5e"), interconnect_gbs=2.0, network_gbs=network)
    found = roofline.roofline(cfg, step, chip, moved=5e9, crossing=1e9)
    assert found["exchange"] == seconds
    assert (found["seconds_in_turn"] is None) == (seconds is None)


def test_plan_for_absent_gpus_says_what_is_not_known(approximate):
    printed = text.to_text(approximate)
    assert "NOT COMPILED: no H200 and no compiler for it is here. The state is exact" in printed
    assert "collectives are those of a program for 8 CPU devices" in printed
    assert "all-to-all" in printed
    assert "merged embedding" in printed
    assert "UNEXPECTED" not in printed
    assert "activations: not known" in printed
    assert printed.splitlines()[-1].startswith("state fits: 141.00 GB")
    assert approximate.fits
    assert approximate.total_bytes == sum(approximate.state.values())
    values = json.loads(json.dumps(text.to_json(approximate)))
    assert values["fits"] is True
    assert values["memory"]["arguments"] == approximate.total_bytes
    assert values["memory"]["temporaries"] is None
    assert {c["what"].split()[0] for c in values["collectives"]} == {"merged", "small:"}


def test_bank_time_is_at_the_rate_of_float32():
    cfg, step = small_step(num_mixtures=8)
    slow = dataclasses.replace(H200, float32_tflops=1e-6, memory_gbs=1e9)
    seconds = roofline.roofline(cfg, step, slow, 0.0)["bank"]
    flops = roofline.step_flops(cfg, step)["merge, alpha's gradient and bank update"]
    assert seconds == pytest.approx(flops / (8 * 1e6))
    # TPUs multiply float32 in six passes, GPUs at less than a tenth of their bfloat16 rate.
    assert all(c.peak_tflops / c.float32_tflops >= 6 for c in chips.CHIPS)


def test_plan_names_the_traffic_of_low_rank_factors():
    fields = {"model.dim": 128, "model.hidden_dim": 1024}  # else too little to be named
    fields["experts.rules"] = ((r"layers/mlp/.*", "low_rank:16"), (".*", "none"))
    cfg = tiny_config(num_mixtures=8, num_experts=16, **fields)
    made = plan.make_plan(cfg, target.find_target(cfg, chip="H200", num_devices=8))
    kinds = {c["kind"]: c["what"] for c in text.to_json(made)["collectives"]}
    assert kinds["reduce-scatter"].startswith("factors low_rank/layers/mlp/")
    assert "UNEXPECTED" not in text.to_text(made)


class NoCollectives:
    def as_text(self):
        return "HloModule m\n"


def test_one_absent_gpu_needs_no_compiler(monkeypatch):
    monkeypatch.setattr(abstract.AbstractStep, "compile", None)
    cfg = tiny_config(**{"experts.dtype": "bfloat16"})
    made = plan.make_plan(cfg, target.find_target(cfg, chip="H100-80GB"))
    printed = text.to_text(made)
    assert "1 x H100" in printed
    assert "collectives: none" in printed


def test_a_compiled_plan_that_fills_a_gpu_says_how_to_get_all_of_it(approximate):
    compiled = dataclasses.replace(
        approximate, approximate="", memory={**approximate.memory, "outputs": 1, "aliased": 1}
    )
    assert "MEM_FRACTION" not in text.to_text(compiled)
    full = dataclasses.replace(compiled, total_bytes=int(0.9 * compiled.memory_bytes))
    printed = text.to_text(full)
    assert "\nfits: 14.10 GB per device are left" in printed
    assert "XLA_PYTHON_CLIENT_MEM_FRACTION=0.95" in printed


def test_a_plan_that_does_not_fit_names_changes(approximate, monkeypatch):
    tiny = chips.Chip("tiny", (), "gpu", approximate.total_bytes * 0.9e-9, 1, 1, 1, 1)
    monkeypatch.setattr(chips, "CHIPS", (tiny,))
    monkeypatch.setattr(abstract.AbstractStep, "compile", lambda step: NoCollectives())
    cfg = tiny_config(num_mixtures=8)
    made = plan.make_plan(cfg, target.find_target(cfg, chip="tiny", num_devices=8))
    assert not made.fits
    printed = text.to_text(made)
    assert "does not fit: the state alone takes 0.00 GB per device too much. To try:" in printed
    for change in made.changes:  # what leaves the state as it is cannot help here
        assert (str(change) in printed) == (change.saves > 0)
    assert "--config.experts.dtype=bfloat16: 0.00 GB less state" in printed
    compiled = dataclasses.replace(
        made, approximate="", memory={**made.memory, "outputs": 1, "aliased": 1}
    )
    assert "--config.model.remat=full: less beside it" in text.to_text(compiled)


def test_a_compiler_that_runs_out_of_memory_tells_how_much_it_wanted():
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (18.25G) exceeds available HBM (15.75G)."
    )
    assert plan._needed_bytes(message) == 18.25 * 2**30
    with pytest.raises(RuntimeError, match="the compiler failed: INTERNAL"):
        plan._needed_bytes("INTERNAL: bug")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"topology": "v5e"}, "unknown topology 'v5e'; it is CHIP:SHAPE"),
        ({"topology": "v9:4x4"}, "unknown topology 'v9:4x4'.*v4:2x2x4"),
        ({"topology": "v5e:4x4", "chip": "v5e"}, "leave --chip/--num_devices out"),
        ({"num_slices": 2}, "--slices counts those of --topology"),
        ({"chip": "H201"}, "unknown chip 'H201'"),
        ({"chip": "H200", "num_devices": 9}, "set XLA_FLAGS="),
        ({}, r"nothing is known of the devices found here \(cpu\)"),
    ],
)
def test_refuses(options, message):
    with pytest.raises(UserError, match=message):
        target.find_target(tiny_config(), **options)


def test_refuses_a_chip_of_another_platform():
    cfg = tiny_config(**{"mesh.platform": "tpu"})
    with pytest.raises(UserError, match=r"mesh\.platform = 'tpu', but H200 is a gpu"):
        target.find_target(cfg, chip="H200")


def test_without_libtpu_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install -e '.\[plan\]'"):
        target.find_target(tiny_config(), topology="v5e:4x4")


@NEEDS_LIBTPU
@pytest.mark.parametrize(
    ("topology", "count"),
    [("v4:2x2x4", 16), ("v5e:1x1", 1), ("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v6e:8x8", 64)],
)
def test_topologies_have_one_device_a_chip(topology, count):
    found = target.find_target(tiny_config(), topology=topology)
    assert len(found.devices) == count
    assert chips.from_kind(found.devices[0].device_kind) == found.chip
    assert not found.approximate


@NEEDS_LIBTPU
def test_groups_of_devices_stay_inside_a_slice_and_along_its_links():
    found = target.find_target(tiny_config(), topology="v5e:4x4", num_slices=2)
    assert (len(found.devices), found.name) == (32, "32 x v5e (2 x v5e:4x4)")
    cfg = mesh.MeshConfig(num_groups=8, rows_per_group=4, fsdp=4)
    for group in mesh.make_mesh(cfg, found.devices).devices:
        assert len({d.slice_index for d in group}) == 1
        # A row of the torus.
        assert len({tuple(d.coords[1:]) for d in group}) == 1


@NEEDS_LIBTPU
def test_a_topology_that_libtpu_refuses():
    with pytest.raises(UserError, match="libtpu does not know the topology 'v5e:3x3'"):
        target.find_target(tiny_config(), topology="v5e:3x3")


def test_command_writes_json_and_its_exit_status_says_whether_it_fits(
    approximate, monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr(plan, "make_plan", lambda cfg, where: approximate)
    words = ["plan", "--config=experiments/quickstart.py", "--chip=H200", "--num_devices=8"]
    assert main.run([*words, f"--json={tmp_path}/plan.json"]) == 0
    assert "memory, GB per device" in capsys.readouterr().out
    assert json.loads((tmp_path / "plan.json").read_text())["mesh"] == {"replica": 8, "fsdp": 1}
    monkeypatch.setattr(plan.Plan, "fits", False)
    assert main.run(words) == 1
    assert main.run([*words, "--chip=H201"]) == 2


@pytest.mark.slow
def test_pod_benchmark_runs_dry(tmp_path):
    script = pathlib.Path(__file__).parents[1] / "benchmarks" / "pod.py"
    config = script.parents[1] / "experiments" / "soup_110m.py"
    words = ["--dry_run", f"--config={config}", f"--json={tmp_path}/pod.json"]
    words += ["--config.optimizer.bank=adamw", f"--trace={tmp_path}/trace"]
    done = subprocess.run(
        [sys.executable, script, *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    values = json.loads((tmp_path / "pod.json").read_text())
    assert values["tokens per second"] > 0
    assert np.isfinite(values["mean loss"])
    assert values["devices"] == "8 x cpu"
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))
    assert "merge, ms" in done.stdout
