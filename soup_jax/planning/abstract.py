"""A training step of shapes alone: its function, and the bytes of its arguments on every device.

Shapes, dtypes and shardings are those of the real program, so bytes of the state are exact.
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
from soup_jax.models.base import BaseModel
from soup_jax.soup import Batch
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
    build.check_rules(cfg, state.params)
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


def num_layers(step: AbstractStep, path: str, leaf: Any) -> int:
    """How many layers a leaf stacks; 0 if the model does not say that it stacks any."""
    stacked = step.model.layers and path.startswith(step.model.layers)
    return leaf.shape[0] if stacked else 0


def merged_bytes(cfg: ConfigDict, step: AbstractStep) -> dict[str, int]:
    """Bytes per device of the merged models and of their gradients, both in the compute dtype, and
    of the gradients' float32 slices, in which micro-batches are summed; not all exist at once."""
    groups, shape = build.num_groups(cfg), step.mesh.shape
    shared = tree.flatten(step.state.params["shared"])
    scalars = sum(leaf.size for leaf in shared.values())
    held = scalars
    if cfg.mesh.gather == "layer":  # slices of all layers, and one layer at a time whole
        for path, leaf in shared.items():
            if layers := num_layers(step, path, leaf):
                held += leaf.size // shape["fsdp"] + leaf.size // layers - leaf.size
    whole = math.ceil(groups / shape["replica"]) * held * jnp.dtype(cfg.model.dtype).itemsize
    return {
        "merged models": whole,
        "their gradients": whole,
        "their gradients in float32 slices": 4 * groups * scalars // step.mesh.size,
    }
