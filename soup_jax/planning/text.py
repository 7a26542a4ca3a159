"""A plan as it is printed, and as JSON."""

import collections
import dataclasses
from typing import Any

from soup_jax.planning import hlo
from soup_jax.planning.plan import Plan

# Collectives below this size are sums of norms, of alpha's gradient and of metrics.
SMALL_BYTES = 1 << 20


def to_json(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan as JSON takes them."""
    values = dataclasses.asdict(plan)
    del values["merged_leaves"], values["factors"]
    for collective, found in zip(values["collectives"], plan.collectives):
        collective["moved_bytes"] = found.moved_bytes
        collective["crossing_bytes"] = found.crossing_bytes
        collective["what"] = _what(plan, found)
    values["fits"] = plan.fits
    return values


def _what(plan: Plan, collective: hlo.Collective) -> str:
    # By size: the compiler keeps no names of leaves.
    sizes = [hlo.num_scalars(shape) for shape in collective.shapes]
    together = plan.merged_leaves.get((sum(sizes), collective.in_loop))
    if together:
        return f"merged {together}"
    names = [plan.merged_leaves.get((size, collective.in_loop), "") for size in sizes]
    if all(names):
        return "merged " + ", ".join(dict.fromkeys(names))
    names = [plan.factors.get(size, "") for size in sizes]
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
        lines.append(f"NOT COMPILED: {plan.approximate}")
    else:
        lines.append(f"compiled in {plan.compile_seconds:.0f} s")
    lines += ["", *_memory_lines(plan), "", *_traffic_lines(plan), "", *_time_lines(plan), ""]
    return "\n".join([*lines, *_verdict_lines(plan)])


def _line(name: str, size: float | None) -> str:
    return f"{name:<38}" + ("     ?" if size is None else f"{size / 1e9:9.3f}")


def _memory_lines(plan: Plan) -> list[str]:
    m, memory = plan.memory, f" of {plan.memory_bytes / 1e9:g}"
    lines = ["memory, GB per device"]
    lines += [_line(f"  {name}", size) for name, size in plan.state.items()]
    if plan.approximate:
        lines += [_line("state", m["arguments"]) + memory, "beside it, not all at the same time"]
        lines += [_line(f"  {name}", size) for name, size in plan.merged.items()]
        return [*lines, "  activations: not known"]
    lines += [_line("arguments, as compiled", m["arguments"])]
    lines += [_line("temporaries, as compiled", m["temporaries"])]
    outputs, aliased = m["outputs"], m["aliased"]
    if outputs is not None and aliased is not None:
        lines += [_line("outputs that reuse no argument", outputs - aliased)]
    return [*lines, _line("program", m["program"]), _line("total", plan.total_bytes) + memory]


def _traffic_lines(plan: Plan) -> list[str]:
    if plan.memory["program"] is None and not plan.approximate:
        return ["collectives: unknown, for the compiler ran out of memory; below, none are counted"]
    if not plan.collectives:
        return ["collectives: none"]
    groups: dict[tuple[Any, ...], list[hlo.Collective]] = collections.defaultdict(list)
    for c in plan.collectives:
        groups[c.kind, c.group_size, c.num_slices, c.in_loop, _what(plan, c)].append(c)
    lines = [f"{'collectives of a step':<22}{'count':>7}{'devices':>9}{'sent, MB':>10}  what"]
    for (kind, size, slices, in_loop, what), found in sorted(groups.items()):
        count, sent = sum(c.times for c in found), sum(c.moved_bytes for c in found)
        if slices > 1:
            what += f" (over {slices} slices)"
        if in_loop:
            what += " (in a loop)" if all(c.known_times for c in found) else " (per iteration)"
        lines.append(f"  {kind:<20}{count:>7}{size:>9}{sent / 1e6:>10.3f}  {what}")
    total = sum(c.moved_bytes for c in plan.collectives)
    lines.append(f"  {'sent by a device':<36}{total / 1e6:>10.3f}")
    if crossing := sum(c.crossing_bytes for c in plan.collectives):
        rate = f"at {plan.network_gbs:g} GB/s" if plan.network_gbs else "at a rate not known"
        lines.append(f"  {'of it to other slices':<36}{crossing / 1e6:>10.3f}  {rate}")
    return lines


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
    for name, text in names.items():
        seconds = r[name]
        shown = "not known" if seconds is None else f"{1e3 * seconds:9.2f}"
        lines.append(f"  {text:<40}{shown}")
    flops = ", ".join(f"{name} {value:.3g}" for name, value in plan.flops.items() if value)
    lines += [f"  FLOPs of a step: {flops}"]
    if r["mfu"] is None:
        return lines
    return [*lines, f"  {r['tokens_per_second']:.3g} tokens/s and MFU {r['mfu']:.0%} at the best"]


def _verdict_lines(plan: Plan) -> list[str]:
    left = (plan.memory_bytes - plan.total_bytes) / 1e9
    if plan.fits and plan.approximate:
        what = "merged models, gradients and activations; how large these are is not known without"
        return [f"state fits: {left:.2f} GB per device are left for {what} the chip"]
    if plan.fits:
        return [f"fits: {left:.2f} GB per device are left", *_preallocation_lines(plan)]
    alone = "the state alone takes " if plan.approximate else ""
    lines = [f"does not fit: {alone}{-left:.2f} GB per device too much. To try:"]
    for change in plan.changes:
        saves = f"{change.saves / 1e9:.2f} GB less state" if change.saves else "less beside it"
        if not (plan.approximate and not change.saves):
            lines.append(f"  {change}: {saves}")
    return [*lines, "  more devices: the state divides over them"]


def _preallocation_lines(plan: Plan) -> list[str]:
    # A chip of n "GB" has n GiB; jax leaves a quarter of a GPU alone unless told otherwise.
    if plan.platform != "gpu" or plan.total_bytes <= 0.75 * plan.memory_bytes * (2**30 / 1e9):
        return []
    return ["set XLA_PYTHON_CLIENT_MEM_FRACTION=0.95: without it jax takes 75% of a GPU's memory"]
