"""One optimizer step, a module-level pure function; `compile_step` jits it in one place.

    coefficients -> merge -> per-mixture loss and gradients -> factored update -> metrics

Metrics are summed on the device, so that the host reads them only every few steps.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import soup
from soup_jax.hardware import compile_cache
from soup_jax.models.base import BaseModel
from soup_jax.optim import apply
from soup_jax.optim.config import OptimizerConfig
from soup_jax.shapes import Array
from soup_jax.soup import Batch, SoupConfig, layout
from soup_jax.training import build
from soup_jax.training.state import TrainState

Metrics = dict[str, Array]


def zero_metrics(num_domains: int) -> Metrics:
    """The accumulator before its first step: sums over steps, or over rows of a domain."""
    scalars = """steps loss learning_rate grad_norm shared_norm bank_norm router_norm
        effective_rate alpha_l1 alpha_l2 alpha_spread targets""".split()
    metrics = {name: jnp.zeros(()) for name in scalars}
    metrics["grad_norm_max"] = jnp.zeros(())
    metrics["bad_step"] = jnp.full((), -1, jnp.int32)
    for name in ("domain_rows", "domain_loss", "domain_targets"):
        metrics[name] = jnp.zeros((num_domains,))
    return metrics


def train_step(
    learning_rate: Array | float,
    state: TrainState,
    metrics: Metrics,
    batch: Batch,
    *,
    model: BaseModel,
    config: SoupConfig,
    optimizer: OptimizerConfig,
    mesh: Mesh | None,
    num_micro: int = 1,
    gather: str = "step",
) -> tuple[TrainState, Metrics]:
    """Apply one update; nothing changes if this or an earlier step was not finite.

    Args:
      learning_rate: in place of the optimizer's.
      num_micro, gather: as of `soup.value_and_grad`.
    """
    (loss, (row_loss_B, row_weight_B)), grads = soup.value_and_grad(
        state.params,
        batch,
        model=model,
        config=config,
        mesh=mesh,
        num_micro=num_micro,
        gather=gather,
    )
    optimizer = dataclasses.replace(optimizer, learning_rate=learning_rate)
    alpha_ME = grads.alpha_ME
    params, opt_state, info = apply.apply_update(
        optimizer,
        state.params,
        state.opt_state,
        grads,
        state.step,
        good=(state.bad_step < 0) & jnp.isfinite(loss),
    )
    bad_step = jnp.where((state.bad_step < 0) & ~info.good, state.step, state.bad_step)
    new = TrainState(params, opt_state, state.step + info.good.astype(jnp.int32), bad_step)
    spread = alpha_ME.std(axis=0).mean() if alpha_ME.size else jnp.zeros(())
    sums = {
        **{name: value for name, value in info._asdict().items() if name != "good"},
        "steps": 1.0,
        "loss": loss,
        "alpha_l1": jnp.abs(alpha_ME).sum(-1).mean(),
        "alpha_l2": jnp.sqrt(jnp.square(alpha_ME).sum(-1)).mean(),
        "alpha_spread": spread,
        "targets": row_weight_B.sum(),
    }
    totals = {name: metrics[name] + value for name, value in sums.items()}
    totals["grad_norm_max"] = jnp.maximum(metrics["grad_norm_max"], info.grad_norm)
    totals["bad_step"] = bad_step  # read with the sums, so that nobody waits for the state
    by_domain = {"rows": jnp.ones_like(row_loss_B), "loss": row_loss_B, "targets": row_weight_B}
    for name, value_B in by_domain.items():
        key = f"domain_{name}"
        totals[key] = metrics[key].at[batch.domain_B].add(value_B)
    return new, totals


def compile_step(cfg: ConfigDict, model: BaseModel, mesh: Mesh, shardings: TrainState) -> Any:
    """The jitted step of a config: the state is donated and keeps its storage layout, batches come
    in as `loader.to_device` laid them out. The sums are not donated: those of a step stay, so that
    the host can wait for its end while the next one runs. Configs that differ in the learning rate
    alone share a program."""
    step = functools.partial(
        train_step,
        model=model,
        config=build.soup_config(cfg),
        optimizer=build.optimizer_config(cfg),
        mesh=mesh,
        num_micro=cfg.optimizer.grad_accumulation,
        gather=cfg.mesh.gather,
    )
    replicated = layout.replicated(mesh)
    metric_shardings = jax.tree.map(lambda _: replicated, zero_metrics(cfg.num_domains))
    jitted = jax.jit(step, donate_argnums=(1,), out_shardings=(shardings, metric_shardings))
    return compile_cache.Bound(jitted, np.float32(cfg.optimizer.learning_rate), replicated)
