"""What can be said of a training step without running or compiling it: bytes, FLOPs, seconds.

Bytes of the state are exact: shapes, dtypes and shardings are those of the real program. What a
step needs beside it is estimated from shapes, to compare two configs and where there is no compiler
to ask (see `plan`).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.config import schema as config_lib
from soup_jax.errors import UserError
from soup_jax.hardware import mesh as mesh_lib
from soup_jax.hardware.chips import Chip
from soup_jax.models.base import BaseModel
from soup_jax.optim.bank import bank_optimizer
from soup_jax.soup import Batch, kernels
from soup_jax.soup import bank as experts
from soup_jax.soup import layout as sharding
from soup_jax.training import build
from soup_jax.training import state as train_state
from soup_jax.training import step as train_step


@dataclasses.dataclass(frozen=True)
class AbstractStep:
    """A jitted train step and arguments that have shapes, dtypes and shardings, but no values."""

    function: Any
    state: train_state.TrainState
    metrics: dict[str, Any]
    batch: Batch
    model: BaseModel
    mesh: Mesh

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What `function` takes."""
        return self.state, self.metrics, self.batch

    def compile(self) -> jax.stages.Compiled:
        """Compile for the mesh's devices, which need not be present."""
        lowered = self.function.lower(*self.arguments)
        if self.mesh.devices.flat[0] in jax.devices():
            return lowered.compile()
        # jax would keep programs for absent devices in its cache, but cannot read them back.
        name = "jax_persistent_cache_min_compile_time_secs"
        least = getattr(jax.config, name)
        jax.config.update(name, 1e9)
        try:
            return lowered.compile()
        finally:
            jax.config.update(name, least)


def abstract_step(cfg: ConfigDict, mesh: Mesh, *, model: BaseModel | None = None) -> AbstractStep:
    """The step of a config on a mesh, whose devices need not be present.

    Args:
      model: a base network of token windows, if it is not the config's.
    """
    model = model or build.base_model(cfg)
    optimizer = build.optimizer_config(cfg)
    make = train_state.make_init(
        build.soup_config(cfg),
        optimizer,
        model,
        seed=cfg.seed,
        frequencies_K=np.full(cfg.num_domains, 1 / cfg.num_domains),
    )
    state = jax.eval_shape(make)
    shardings = train_state.state_shardings(mesh, state, optimizer)
    everywhere, rows = sharding.replicated(mesh), sharding.batch(mesh)
    metrics = jax.eval_shape(lambda: train_step.zero_metrics(cfg.num_domains))
    num_rows, int32 = cfg.batch_size, jnp.int32
    batch = Batch(
        rows={
            "tokens": jax.ShapeDtypeStruct((num_rows, cfg.seq_len + 1), int32, sharding=rows),
            "num_targets": jax.ShapeDtypeStruct((num_rows,), int32, sharding=rows),
        },
        h_MK=jax.ShapeDtypeStruct(
            (cfg.num_mixtures, cfg.num_domains), jnp.float32, sharding=everywhere
        ),
        domain_B=jax.ShapeDtypeStruct((num_rows,), int32, sharding=rows),
    )
    return AbstractStep(
        function=train_step.compile_step(cfg, model, mesh, shardings),
        state=jax.tree.map(_laid_out, state, shardings),
        metrics=jax.tree.map(lambda leaf: _laid_out(leaf, everywhere), metrics),
        batch=batch,
        model=model,
        mesh=mesh,
    )


def _laid_out(leaf: Any, where: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where)


def device_bytes(tree_: Any) -> int:
    """Bytes that one device holds of a tree of abstract arrays with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree_)
    )


def state_bytes(step: AbstractStep) -> dict[str, int]:
    """Bytes per device of each part of what goes into a step."""
    params, moments = step.state.params, step.state.opt_state
    return {
        "shared parameters": device_bytes(params["shared"]),
        "bank": device_bytes(params["bank"]),
        "router": device_bytes(params["router"]),
        "moments of shared and router": device_bytes(moments["base"]),
        "moments of the bank": device_bytes(moments["bank"]),
        "batch and metrics": device_bytes((step.batch, step.metrics)),
    }


def merged_bytes(cfg: ConfigDict, step: AbstractStep) -> dict[str, int]:
    """Bytes per device of the merged models and their gradients, both in the compute dtype, and of
    the gradients' float32 slices, in which micro-batches are summed."""
    groups, size = mesh_lib.num_groups(cfg), tree.num_params(step.state.params["shared"])
    local = math.ceil(groups / step.mesh.shape["replica"])
    whole = local * size * jnp.dtype(cfg.model.dtype).itemsize
    if cfg.mesh.gather == "layer":
        whole = whole // step.mesh.shape["fsdp"] + whole // cfg.model.num_layers
    return {
        "merged models": whole,
        "gradients of merged models": whole,
        "their float32 slices": 4 * groups * size // step.mesh.size,
    }


def activation_bytes(cfg: ConfigDict, num_devices: int) -> dict[str, float]:
    """Bytes per device of what the decoder keeps for its backward pass, and works on.

    The larger of the working sets of a layer and of the loss is counted: they follow each other.
    """
    m, size = cfg.model, jnp.dtype(cfg.model.dtype).itemsize
    tokens = cfg.batch_size * cfg.seq_len / num_devices / cfg.optimizer.grad_accumulation
    kv_dim = m.dim * m.num_kv_heads // m.num_heads
    products = size * (3 * m.dim + 2 * kv_dim + 2 * m.hidden_dim)
    everything = products + size * (4 * m.dim + m.hidden_dim)
    # Scores and their gradient in float32, one of them again in the compute dtype.
    scores = 0 if m.attention == "cudnn" else (8 + size) * m.num_heads * cfg.seq_len
    # Without remat, what is between products is kept as well: normed, rotated and gated values.
    between = size * (2 * m.dim + m.hidden_dim)
    kept = size * m.dim + {"none": everything + between, "dots": products, "full": 0}[m.remat]
    logits = 8 * cfg.vocab_size * (m.loss_chunk or cfg.seq_len) / cfg.seq_len
    return {
        "activations kept": tokens * m.num_layers * kept,
        "working set of a layer or the loss": tokens * max(everything + scores, logits),
    }


def update_bytes(cfg: ConfigDict, step: AbstractStep) -> int:
    """Bytes per device that the bank's update of the largest leaf works on: its merged gradients,
    scaled, and the gradients of one block of experts, float32."""
    bank = jax.tree.leaves(step.state.params["bank"])
    if not bank:
        return 0
    groups = mesh_lib.num_groups(cfg)
    block = min(cfg.num_experts, kernels.block_size(groups, cfg.num_experts))
    slices = (math.prod(leaf.sharding.shard_shape(leaf.shape)[1:]) for leaf in bank)
    return 4 * (groups + block) * max(slices)


def temporary_bytes(cfg: ConfigDict, step: AbstractStep) -> dict[str, int]:
    """Bytes per device of what a step needs beside its arguments, estimated from shapes.

    The larger of what exists in the backward pass and in the update, and a third more for copies
    that a compiler makes of its own (of another layout, or padded). What the TPU compiler needs for
    one v5p was 0.55 to 0.98 of that, for 8 experts and 4 mixtures of the 35M network
    (`soup-jax plan --config=experiments/base.py:35m --topology=v5p:1x1x1` prints both numbers; with
    `--config.vocab_size=32000 --config.seq_len=1024 --config.batch_size=16 --config.num_mixtures=4
    --config.model.dtype=bfloat16 --config.experts.dtype=bfloat16 --config.model.loss_chunk=128`):

                                           GB  compiled  estimated
        model.remat=dots                          2.058      3.257
        the same, optimizer.bank=adamw            2.058      3.257
        the same, grad_accumulation=2             2.242      2.362
        model.remat=full                          1.230      2.217
        model.remat=none, num_mixtures=1          3.934      4.031

    No GPU was compared.
    """
    merged = merged_bytes(cfg, step)
    slices = merged.pop("their float32 slices")
    backward = {**merged, **activation_bytes(cfg, step.mesh.size)}
    if cfg.optimizer.grad_accumulation > 1:
        backward["sum over micro-batches"] = slices
    update = {
        "gradients of merged models": slices,
        "update of the bank's largest leaf": update_bytes(cfg, step),
    }
    largest = max(backward, update, key=lambda parts: sum(parts.values()))
    largest["allowance for the compiler's copies"] = sum(largest.values()) / 3
    return {name: int(size) for name, size in largest.items()}


def step_flops(cfg: ConfigDict, step: AbstractStep) -> dict[str, float]:
    """FLOPs of one step over all devices: base network (without recomputation), and the bank.

    The bank's: merge, gradient of alpha, and update, each 2 M operations for every multiply-add
    that a kind of experts needs to merge one mixture.
    """
    params = step.state.params
    operations = sum(
        experts.kind_of(name).operations(stacks)
        for name, part in params["bank"].items()
        for stacks in experts.by_leaf(part, params["shared"]).values()
    )
    return {
        "base network": step.model.flops_per_row * cfg.batch_size,
        "merge, alpha's gradient and bank update": 6.0 * mesh_lib.num_groups(cfg) * operations,
    }


def bank_passes(cfg: ConfigDict) -> dict[str, float]:
    """How often a step reads or writes all of the bank, and of each of its moments.

    The bank is read by the merge and by alpha's gradient; the rest its optimizer says.
    """
    optimizer = bank_optimizer(build.optimizer_config(cfg))
    return {"bank": 2 + optimizer.bank_passes, "moments": optimizer.state_passes}


def bank_traffic(cfg: ConfigDict, step: AbstractStep) -> float:
    """Bytes per device that a step must move of state, merged models and their gradients.

    Merged gradients are written once, read for the norms and by alpha's gradient, and by the update
    for every block of experts.
    """
    parts, passes, groups = state_bytes(step), bank_passes(cfg), mesh_lib.num_groups(cfg)
    state = passes["bank"] * parts["bank"] + passes["moments"] * parts["moments of the bank"]
    state += 3 * parts["shared parameters"] + 2 * parts["moments of shared and router"]
    merged = merged_bytes(cfg, step)
    blocks = math.ceil(cfg.num_experts / kernels.block_size(groups, cfg.num_experts))
    return state + merged["merged models"] + (3 + blocks) * merged["their float32 slices"]


def roofline(cfg: ConfigDict, step: AbstractStep, chip: Chip, moved: float) -> dict[str, float]:
    """Seconds per step at the chip's data-sheet rates, tokens per second and MFU.

    Args:
      moved: bytes that a device sends in one step.

    Returns:
      seconds of "compute" (recomputation of remat included), "bank" (the slower of its memory
      traffic and its FLOPs) and "exchange"; "seconds_at_least", if the three overlap completely,
      and "seconds_in_turn", if they do not; "tokens_per_second" and "mfu", of the latter.
    """
    count, flops = step.mesh.size, step_flops(cfg, step)
    model_flops, bank_flops = flops.values()
    peak = chip.peak_tflops * 1e12 * count
    recomputed = {"none": 1.0, "dots": 1.0, "full": 4 / 3}[cfg.model.remat]
    compute = recomputed * model_flops / peak
    # The bank's sums are float32 whatever it is stored in.
    bank_peak = chip.float32_tflops * 1e12 * count
    bank = max(bank_traffic(cfg, step) / (chip.memory_gbs * 1e9), bank_flops / bank_peak)
    exchange = moved / (chip.exchange_gbs(count) * 1e9)
    in_turn = compute + bank + exchange
    return {
        "compute": compute,
        "bank": bank,
        "exchange": exchange,
        "seconds_at_least": max(compute, bank, exchange),
        "seconds_in_turn": in_turn,
        "tokens_per_second": cfg.batch_size * cfg.seq_len / in_turn,
        "mfu": model_flops / peak / in_turn,
    }


def estimated_bytes(cfg: ConfigDict, devices: list[Any]) -> float:
    """State and temporaries of a config by shapes alone, to be compared with another's.

    Raises:
      UserError: the config is not valid on these devices.
    """
    cfg = config_lib.check(cfg)
    step = abstract_step(cfg, mesh_lib.make_mesh(cfg, devices))
    return sum(state_bytes(step).values()) + sum(temporary_bytes(cfg, step).values())


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of the config, and how many bytes per device it is estimated to save."""

    fields: dict[str, Any]
    saves: float

    def __str__(self) -> str:
        return " ".join(f"--config.{name}={value}" for name, value in self.fields.items())


def savings(cfg: ConfigDict, devices: list[Any]) -> list[Change]:
    """Changes that save memory and are valid here, the largest saving first; one a field."""
    now = estimated_bytes(cfg, devices)
    best: dict[str, Change] = {}
    for name, value in _candidates(cfg):
        try:
            saves = now - estimated_bytes(changed(cfg, {name: value}), devices)
        except UserError:
            continue
        if saves > 0 and (name not in best or saves > best[name].saves):
            best[name] = Change({name: value}, saves)
    return sorted(best.values(), key=lambda change: -change.saves)


def _candidates(cfg: ConfigDict) -> list[tuple[str, Any]]:
    o = cfg.optimizer
    candidates = [
        ("optimizer.bank", "merged"),
        ("optimizer.moment_dtype", "bfloat16"),
        ("experts.dtype", "bfloat16"),
        ("model.dtype", "bfloat16"),
        ("model.remat", "dots"),
        ("model.remat", "full"),
        ("mesh.gather", "layer"),
        ("optimizer.grad_accumulation", 2 * o.grad_accumulation),
        ("optimizer.grad_accumulation", 4 * o.grad_accumulation),
    ]
    chunks = [c for c in (512, 256, 128, 64) if c < (cfg.model.loss_chunk or cfg.seq_len)]
    return candidates + [("model.loss_chunk", c) for c in chunks[:2]]


def changed(cfg: ConfigDict, fields: dict[str, Any]) -> ConfigDict:
    """A copy of a config with some fields replaced."""
    copy = cfg.copy_and_resolve_references()
    with copy.unlocked():
        copy.update_from_flattened_dict(fields)
    return copy


def devices_needed(cfg: ConfigDict, step: AbstractStep, total: float, memory: float) -> int | None:
    """The smallest doubling of the device count whose share of `total` bytes fits `memory`.

    All but one merged model divides over the devices; None if the batch does not divide so far.
    """
    size = tree.num_params(step.state.params["shared"]) * jnp.dtype(cfg.model.dtype).itemsize
    count = step.mesh.size
    while True:
        count *= 2
        if cfg.batch_size // cfg.optimizer.grad_accumulation % count:
            return None
        if (total - size) * step.mesh.size / count + size <= memory:
            return count
