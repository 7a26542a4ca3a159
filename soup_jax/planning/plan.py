"""What a run will need, before anything is run or read: memory, communication, time.

    soup-jax plan --config=experiments/soup_110m.py --topology=v5e:4x4

The step is compiled from shapes alone. For a TPU slice the real TPU compiler does it ahead of time,
on any Linux x86-64 machine (`pip install -e '.[plan]'`); for devices that are present, their own.
Chips that are absent and have no compiler here (GPUs) get the exact state and the collectives of a
program for as many CPU devices; the size of activations is then not known.
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
from soup_jax.errors import UserError
from soup_jax.models.base import BaseModel
from soup_jax.planning import hlo
from soup_jax.planning import roofline as roofline_lib
from soup_jax.planning.abstract import (
    AbstractStep,
    abstract_step,
    merged_bytes,
    num_layers,
    state_bytes,
)
from soup_jax.planning.target import Target
from soup_jax.shapes import Params
from soup_jax.soup.bank import kind_of
from soup_jax.training import build

# Fields that make the state smaller, and what they are tried with.
SMALLER_STATE = {
    "optimizer.bank": "merged",
    "optimizer.moment_dtype": "bfloat16",
    "experts.dtype": "bfloat16",
}

# What a compiler reports; "aliased" are outputs that take the place of arguments.
MEMORY = ("arguments", "temporaries", "outputs", "aliased", "program")


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the config; how many bytes per device the state gets smaller by, 0 if none."""

    field: str
    value: Any
    saves: int = 0

    def __str__(self) -> str:
        return f"--config.{self.field}={self.value}"


@dataclasses.dataclass(frozen=True)
class Plan:
    """Numbers per device and step; bytes, FLOPs, seconds.

    Attributes:
      state: bytes of each part of the arguments, by shapes and shardings.
      merged: bytes of merged models and their gradients, by shapes.
      merged_leaves: names of leaves by the number of scalars that a device exchanges of them, and
        whether that is in a loop over layers.
      factors: names of low-rank factors, the same way.
      memory: what the compiler reports; None for what it does not, as it ran out of memory. For
        chips without a compiler: the arguments alone, by shapes.
      total_bytes: arguments, temporaries, program, and outputs that reuse no argument, as far as
        they are known.
      memory_bytes: of the chip.
      network_gbs: of the chip to other slices, 10^9 bytes a second; 0: not known.
      collectives: empty if the compiler ran out of memory.
      roofline: see `roofline.roofline`.
      changes: of the config, that make the state smaller, and others to try; empty if it fits.
    """

    config: str
    target: str
    platform: str
    approximate: str
    mesh: dict[str, int]
    compile_seconds: float
    state: dict[str, int]
    merged: dict[str, int]
    merged_leaves: dict[tuple[int, bool], str]
    factors: dict[int, str]
    memory: dict[str, int | None]
    total_bytes: int
    memory_bytes: int
    network_gbs: float
    flops: dict[str, float]
    collectives: list[hlo.Collective]
    roofline: dict[str, float | None]
    changes: list[Change]

    @property
    def fits(self) -> bool:
        """Whether what is known is at most the chip's memory."""
        return self.total_bytes <= self.memory_bytes


def make_plan(cfg: ConfigDict, target: Target, *, model: BaseModel | None = None) -> Plan:
    """Add up what the step of a config needs on a target.

    Args:
      model: a base network of token windows, if it is not the config's.

    Raises:
      UserError: the config is not valid on these devices.
    """
    config_lib.check(cfg)
    config_lib.check_start(cfg)
    fields = {"mesh.platform": ""}  # checked; CPUs may stand in
    if target.devices[0].platform != "gpu":
        fields["model.attention"] = "xla"  # the others ask this machine's devices, not the target's
    on_target = _changed(cfg, fields)
    mesh = build.make_mesh(on_target, list(target.devices))
    step = abstract_step(on_target, mesh, model=model)
    state = state_bytes(step)
    start = time.perf_counter()
    if target.approximate:
        # What the CPU's compiler says of memory is not used: it makes float32 copies of a bfloat16
        # bank.
        memory = dict.fromkeys(MEMORY)
        text = step.compile().as_text() if mesh.size > 1 else ""
    else:
        memory, text = compile_report(step)
    seconds = time.perf_counter() - start
    if memory["arguments"] is None:
        memory["arguments"] = sum(state.values())
    known = {name: size or 0 for name, size in memory.items()}
    total = sum(known.values()) - 2 * known["aliased"]
    limit = int(target.chip.memory_gb * 1e9)
    found = hlo.collectives(text) if text else []
    moved = sum(hlo.total_bytes(found).values())
    crossing = sum(c.crossing_bytes for c in found)
    return Plan(
        config=cfg.name,
        target=target.name,
        platform=target.chip.platform,
        approximate=target.approximate,
        mesh=dict(mesh.shape),
        compile_seconds=seconds,
        state=state,
        merged=merged_bytes(on_target, step),
        merged_leaves=_merged_leaves(on_target, step),
        factors=_factors(step),
        memory=memory,
        total_bytes=total,
        memory_bytes=limit,
        network_gbs=target.chip.network_gbs,
        flops=roofline_lib.step_flops(on_target, step),
        collectives=found,
        roofline=roofline_lib.roofline(on_target, step, target.chip, moved, crossing),
        changes=changes(on_target, step) if total > limit else [],
    )


def _merged_leaves(cfg: ConfigDict, step: AbstractStep) -> dict[tuple[int, bool], str]:
    # A device's part of a stack of merged leaves is M slices of it, or whole ones of its group, or
    # one layer of those inside a loop over layers.
    groups, shape = build.num_groups(cfg), step.mesh.shape
    names: dict[tuple[int, bool], list[str]] = collections.defaultdict(list)
    for path, leaf in tree.flatten(step.state.params["shared"]).items():
        local = groups * leaf.size // shape["replica"]
        layers = num_layers(step, path, leaf) or 1
        sliced = groups * leaf.size // step.mesh.size
        for key in {
            (sliced, False),
            (local, False),
            (sliced // layers, True),
            (local // layers, True),
        }:
            names[key].append(path)
    return {key: ", ".join(paths) for key, paths in names.items()}


def _factors(step: AbstractStep) -> dict[int, str]:
    # Low-rank factors travel whole, or in slices along either axis or both.
    params, shape = step.state.params, step.mesh.shape
    names: dict[int, dict[str, None]] = collections.defaultdict(dict)
    for path, leaf in tree.flatten(_explicit(params["bank"])).items():
        for parts in (1, shape["fsdp"], shape["replica"], step.mesh.size):
            names[leaf.size // parts][path] = None
    return {size: ", ".join(paths) for size, paths in names.items()}


def _explicit(bank: Params) -> Params:
    return {name: part for name, part in bank.items() if not kind_of(name).factored}


def compile_report(step: AbstractStep) -> tuple[dict[str, int | None], str]:
    """What the compiler says of a step: bytes per device by kind, and the program's text.

    If the temporaries alone exceed the chip, the TPU compiler stops and tells their size; the text
    is empty then, and all else is None.
    """
    memory: dict[str, int | None] = dict.fromkeys(MEMORY)
    try:
        compiled = step.compile()
    except jax.errors.JaxRuntimeError as e:
        memory["temporaries"] = _needed_bytes(str(e))
        return memory, ""
    m: Any = compiled.memory_analysis()
    memory["arguments"] = m.argument_size_in_bytes
    memory["temporaries"] = m.temp_size_in_bytes
    memory["outputs"] = m.output_size_in_bytes
    memory["aliased"] = m.alias_size_in_bytes
    memory["program"] = m.generated_code_size_in_bytes
    return memory, compiled.as_text() or ""


def _needed_bytes(message: str) -> int:
    # "... required for HLO temporaries (18.26G) exceeds available HBM (15.75G)", in GiB.
    found = re.search(r"RESOURCE_EXHAUSTED.*?\(([\d.]+)([KMGT])\) exceeds", message, re.S)
    if not found:
        raise RuntimeError(f"the compiler failed: {message}")
    return int(float(found[1]) * 1024 ** ("KMGT".index(found[2]) + 1))


def changes(cfg: ConfigDict, step: AbstractStep) -> list[Change]:
    """Changes that save memory and are valid here: of the state, the largest saving first, then
    those that concern activations, whose saving is not known."""
    devices, now = list(step.mesh.devices.flat), sum(state_bytes(step).values())
    smaller, others = [], []
    tries = {
        "model.remat": "full",
        "optimizer.grad_accumulation": 2 * cfg.optimizer.grad_accumulation,
        "model.loss_chunk": (cfg.model.loss_chunk or cfg.seq_len) // 2,
        "mesh.gather": "layer",
        "model.dtype": "bfloat16",
    }
    for field, value in {**SMALLER_STATE, **tries}.items():
        section, name = field.split(".")
        if cfg[section][name] == value:
            continue
        try:
            other = config_lib.check(_changed(cfg, {field: value}))
            changed = abstract_step(other, build.make_mesh(other, devices))
        except UserError:
            continue
        if field in tries:
            others.append(Change(field, value))
        elif (saves := now - sum(state_bytes(changed).values())) > 0:
            smaller.append(Change(field, value, saves))
    return sorted(smaller, key=lambda change: -change.saves) + others


def _changed(cfg: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    copy = cfg.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(fields)
    return copy
