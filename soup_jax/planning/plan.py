"""What a run will need, before anything is run or read: memory, communication, time.

    soup-jax plan --config=experiments/soup_110m.py --topology=v5e:4x4

The train step is compiled for the devices of the run from shapes alone. For a TPU slice that is the
real TPU compiler, ahead of time, on any Linux x86-64 machine (`pip install -e '.[plan]'`).

For chips that are not present and have no compiler here (GPUs) the plan is an estimate, and says
so: the state is exact, temporaries are added up from shapes (`estimate.temporary_bytes`), and
collectives are those of a program for as many CPU devices. What the CPU's compiler says of memory
is not used: it makes float32 copies of a bfloat16 bank.
"""

import collections
import dataclasses
import re
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.config import schema as config_lib
from soup_jax.hardware import mesh as mesh_lib
from soup_jax.planning import estimate, hlo
from soup_jax.planning.target import Target
from soup_jax.shapes import Params
from soup_jax.soup.bank import kind_of

# Collectives below this size are sums of norms, of alpha's gradient and of metrics.
SMALL_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers per device and step; bytes, FLOPs, seconds.

    Attributes:
      state: bytes of each part of the arguments, by shapes and shardings.
      temporaries: what they are for, in bytes, by shapes alone; the compiler's sum may be another.
      merged_leaves: names of leaves by the number of scalars that a device exchanges of them, and
        whether that is in a loop over layers.
      factors: names of low-rank factors, the same way.
      memory: what the compiler reports; None for what it does not, as it ran out of memory. For
        chips without a compiler: the estimate.
      total_bytes: arguments, temporaries, program, and outputs that reuse no argument.
      estimated_bytes: the total as shapes alone suggest it.
      memory_bytes: of the chip.
      collectives: empty if the compiler ran out of memory.
      roofline: see `estimate.roofline`.
      changes: of the config, that make it fit; empty if it fits.
    """

    config: str
    target: str
    platform: str
    approximate: str
    mesh: dict[str, int]
    compile_seconds: float
    state: dict[str, int]
    temporaries: dict[str, int]
    merged_leaves: dict[tuple[int, bool], str]
    factors: dict[int, str]
    memory: dict[str, int | None]
    total_bytes: int
    estimated_bytes: float
    memory_bytes: int
    flops: dict[str, float]
    collectives: list[hlo.Collective]
    roofline: dict[str, float]
    changes: list[estimate.Change]
    devices_needed: int | None

    @property
    def fits(self) -> bool:
        """Whether the total is at most the chip's memory."""
        return self.total_bytes <= self.memory_bytes


def make_plan(cfg: ConfigDict, target: Target) -> Plan:
    """Add up what the step of a config needs on a target, compiled or estimated.

    Raises:
      UserError: the config is not valid on these devices.
    """
    config_lib.check(cfg)
    fields = {"mesh.platform": ""}  # checked; CPUs may stand in
    if target.devices[0].platform != "gpu":
        fields["model.attention"] = "xla"  # the others ask this machine's devices, not the target's
    on_target = estimate.changed(cfg, fields)
    mesh = mesh_lib.make_mesh(on_target, list(target.devices))
    step = estimate.abstract_step(on_target, mesh)
    state, temporaries = estimate.state_bytes(step), estimate.temporary_bytes(on_target, step)
    start = time.perf_counter()
    if target.approximate:
        memory = _estimated(state, temporaries)
        text = step.compile().as_text() if mesh.size > 1 else ""
    else:
        memory, text = compile_report(step)
    seconds = time.perf_counter() - start
    if memory["arguments"] is None:
        memory["arguments"] = sum(state.values())
    total = _total(memory)
    limit = int(target.chip.memory_gb * 1e9)
    changes, needed = [], None
    if total > limit:
        changes = changes_that_fit(on_target, target, total, limit)
        needed = estimate.devices_needed(on_target, step, total, limit)
    found = hlo.collectives(text) if text else []
    moved = sum(hlo.total_bytes(found).values())
    return Plan(
        config=cfg.name,
        target=target.name,
        platform=target.chip.platform,
        approximate=target.approximate,
        mesh=dict(mesh.shape),
        compile_seconds=seconds,
        state=state,
        temporaries=temporaries,
        merged_leaves=_merged_leaves(on_target, step),
        factors=_factors(step),
        memory=memory,
        total_bytes=total,
        estimated_bytes=sum(state.values()) + sum(temporaries.values()),
        memory_bytes=limit,
        flops=estimate.step_flops(on_target, step),
        collectives=found,
        roofline=estimate.roofline(on_target, step, target.chip, moved),
        changes=changes,
        devices_needed=needed,
    )


def _estimated(state: dict[str, int], temporaries: dict[str, int]) -> dict[str, int | None]:
    # Outputs take the place of the arguments: all of them are donated.
    arguments = sum(state.values())
    memory: dict[str, int | None] = {
        "arguments": arguments,
        "temporaries": sum(temporaries.values()),
    }
    return {**memory, "outputs": arguments, "aliased": arguments, "program": 0}


def _total(memory: dict[str, int | None]) -> int:
    m = {name: value or 0 for name, value in memory.items()}
    return m["arguments"] + m["temporaries"] + m["program"] + m["outputs"] - m["aliased"]


def _merged_leaves(cfg: ConfigDict, step: estimate.AbstractStep) -> dict[tuple[int, bool], str]:
    # A device's part of a stack of merged leaves is M slices of it, or whole ones of its group, or
    # one layer of those inside a loop over layers.
    groups, shape = mesh_lib.num_groups(cfg), step.mesh.shape
    names: dict[tuple[int, bool], list[str]] = collections.defaultdict(list)
    for path, leaf in tree.flatten(step.state.params["shared"]).items():
        local = groups * leaf.size // shape["replica"]
        layers = leaf.shape[0] if path.startswith("layers/") else 1
        sliced = groups * leaf.size // step.mesh.size
        for key in {
            (sliced, False),
            (local, False),
            (sliced // layers, True),
            (local // layers, True),
        }:
            names[key].append(path)
    return {key: ", ".join(paths) for key, paths in names.items()}


def _factors(step: estimate.AbstractStep) -> dict[int, str]:
    # Low-rank factors travel whole, or in slices along either axis or both.
    params, shape = step.state.params, step.mesh.shape
    names: dict[int, dict[str, None]] = collections.defaultdict(dict)
    for path, leaf in tree.flatten(_explicit(params["bank"])).items():
        for parts in (1, shape["fsdp"], shape["replica"], step.mesh.size):
            names[leaf.size // parts][path] = None
    return {size: ", ".join(paths) for size, paths in names.items()}


def _explicit(bank: Params) -> Params:
    return {name: part for name, part in bank.items() if not kind_of(name).factored}


def compile_report(step: estimate.AbstractStep) -> tuple[dict[str, int | None], str]:
    """What the compiler says of a step: bytes per device by kind, and the program's text.

    If the temporaries alone exceed the chip, the TPU compiler stops and tells their size; the text
    is empty then, and all else is None.
    """
    memory: dict[str, int | None] = dict.fromkeys(
        ("arguments", "temporaries", "outputs", "aliased", "program")
    )
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as e:
        memory["temporaries"] = _needed_bytes(str(e))
        return memory, ""
    m = compiled.memory_analysis()
    memory["arguments"] = m.argument_size_in_bytes
    memory["temporaries"] = m.temp_size_in_bytes
    memory["outputs"] = m.output_size_in_bytes
    memory["aliased"] = m.alias_size_in_bytes
    memory["program"] = m.generated_code_size_in_bytes
    return memory, compiled.as_text()


def _needed_bytes(message: str) -> int:
    # "... required for HLO temporaries (18.26G) exceeds available HBM (15.75G)", in GiB.
    found = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT])\) exceeds", message, re.S)
    if not found:
        raise RuntimeError(f"the compiler failed: {message}")
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def changes_that_fit(
    cfg: ConfigDict, target: Target, total: int, limit: int
) -> list[estimate.Change]:
    """The fewest changes, of the three that save most, whose estimated savings are enough.

    All three if they are not.
    """
    options = estimate.savings(cfg, list(target.devices))[:3]
    for number in range(1, len(options) + 1):
        if sum(change.saves for change in options[:number]) >= total - limit:
            # More than one way out: what fits alone is shown with the next best.
            return options[: max(number, 2)]
    return options


def to_json(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan as JSON takes them."""
    values = dataclasses.asdict(plan)
    del values["merged_leaves"], values["factors"]
    for collective, found in zip(values["collectives"], plan.collectives):
        collective["moved_bytes"] = found.moved_bytes
        collective["what"] = _what(plan, found)
    values["fits"] = plan.fits
    return values


def _what(plan: Plan, collective: hlo.Collective) -> str:
    # By size: the compiler keeps no names of leaves.
    sizes = [hlo.num_scalars(shape) for shape in collective.shapes]
    together = plan.merged_leaves.get((sum(sizes), collective.in_loop))
    if together:
        return f"merged {together}"
    names = [plan.merged_leaves.get((size, collective.in_loop)) for size in sizes]
    if all(names):
        return "merged " + ", ".join(dict.fromkeys(names))
    names = [plan.factors.get(size) for size in sizes]
    if all(names):
        return "factors " + ", ".join(dict.fromkeys(names))
    if collective.payload_bytes < SMALL_BYTES:
        return "small: norms, router, metrics"
    return "UNEXPECTED: large, and of no merged leaf's size"


def to_text(plan: Plan) -> str:
    """The plan as it is printed."""
    mesh = " ".join(f"{axis}={size}" for axis, size in plan.mesh.items())
    lines = [f"{plan.config} on {plan.target}; mesh {mesh}"]
    if plan.approximate:
        lines.append(f"ESTIMATE: {plan.approximate}")
    else:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s")
    lines += ["", *_memory_lines(plan), "", *_traffic_lines(plan), "", *_time_lines(plan), ""]
    return "\n".join([*lines, *_verdict_lines(plan)])


def _gb(value: float | None) -> str:
    return "     ?" if value is None else f"{value / 1e9:9.3f}"


def _memory_lines(plan: Plan) -> list[str]:
    def line(name: str, size: float | None) -> str:
        return f"{name:<38}{_gb(size)}"

    m = plan.memory
    parts = [line(f"  {name}", size) for name, size in plan.temporaries.items()]
    lines = ["memory, GB per device"]
    lines += [line(f"  {name}", size) for name, size in plan.state.items()]
    total = line("total", plan.total_bytes) + f" of {plan.memory_bytes / 1e9:g}"
    if plan.approximate:
        lines += [line("state, by its shapes", m["arguments"]), *parts]
        return [*lines, line("temporaries, estimated", m["temporaries"]), total]
    lines += [line("arguments, as compiled", m["arguments"])]
    lines += [line("temporaries, as compiled", m["temporaries"])]
    if m["outputs"] is not None:
        lines += [line("outputs that reuse no argument", m["outputs"] - m["aliased"])]
    lines += [line("program", m["program"]), total]
    lines += [line("for comparison, estimated from shapes", plan.estimated_bytes)]
    return [*lines, line("of it temporaries", sum(plan.temporaries.values())), *parts]


def _traffic_lines(plan: Plan) -> list[str]:
    if plan.memory["program"] is None:
        return ["collectives: unknown, for the compiler ran out of memory; below, none are counted"]
    if not plan.collectives:
        return ["collectives: none"]
    groups: dict[tuple[Any, ...], list[hlo.Collective]] = collections.defaultdict(list)
    for c in plan.collectives:
        groups[c.kind, c.group_size, c.in_loop, _what(plan, c)].append(c)
    lines = [f"{'collectives of a step':<22}{'count':>7}{'devices':>9}{'sent, MB':>10}  what"]
    for (kind, size, in_loop, what), found in sorted(groups.items()):
        count, sent = sum(c.times for c in found), sum(c.moved_bytes for c in found)
        if in_loop:
            what += " (in a loop)" if all(c.known_times for c in found) else " (per iteration)"
        lines.append(f"  {kind:<20}{count:>7}{size:>9}{sent / 1e6:>10.3f}  {what}")
    total = sum(c.moved_bytes for c in plan.collectives)
    return [*lines, f"  {'sent by a device':<36}{total / 1e6:>10.3f}"]


def _time_lines(plan: Plan) -> list[str]:
    r = plan.roofline
    lines = [f"{'time of a step, at data-sheet rates':<36}{'ms':>9}"]
    names = {
        "compute": "base network, recomputation included",
        "bank": "bank: merge, gradient of alpha, update",
        "exchange": "exchange between devices",
        "seconds_at_least": "all of it overlapped",
        "seconds_in_turn": "one after the other",
    }
    lines += [f"  {text:<40}{1e3 * r[name]:9.2f}" for name, text in names.items()]
    flops = ", ".join(f"{name} {value:.3g}" for name, value in plan.flops.items())
    lines += [f"  FLOPs of a step: {flops}"]
    return [*lines, f"  {r['tokens_per_second']:.3g} tokens/s and MFU {r['mfu']:.0%} at the best"]


def _verdict_lines(plan: Plan) -> list[str]:
    over = (plan.total_bytes - plan.memory_bytes) / 1e9
    by_estimate = " by estimate" if plan.approximate else ""
    if plan.fits:
        lines = [f"fits{by_estimate}: {-over:.2f} GB per device are left"]
        return lines + _preallocation_lines(plan)
    lines = [f"does not fit{by_estimate}: {over:.2f} GB per device too much. Estimated to save:"]
    for change in plan.changes:
        alone = ", enough alone" if change.saves >= 1e9 * over else ""
        lines.append(f"  {change.saves / 1e9:7.2f} GB  {change}{alone}")
    if sum(change.saves for change in plan.changes) < 1e9 * over:
        lines.append("  together not enough")
    if plan.devices_needed:
        lines.append(f"  or {plan.devices_needed} devices instead of {_devices(plan)}")
    return lines


def _preallocation_lines(plan: Plan) -> list[str]:
    # A chip of n "GB" has n GiB; jax leaves a quarter of a GPU alone unless told otherwise.
    if plan.platform != "gpu" or plan.total_bytes <= 0.75 * plan.memory_bytes * (2**30 / 1e9):
        return []
    return ["set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: without it jax takes 75% of a GPU's memory"]


def _devices(plan: Plan) -> int:
    return plan.mesh["replica"] * plan.mesh["fsdp"]
