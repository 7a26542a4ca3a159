"""What the benchmarks share: a real train step, state and a random batch; no data is read."""

import ast
import dataclasses
import runpy
from typing import Any

import jax
import numpy as np

from soup_jax.config import schema as config_lib
from soup_jax.data import loader
from soup_jax.planning.abstract import AbstractStep, abstract_step
from soup_jax.soup import Batch
from soup_jax.soup import layout as sharding
from soup_jax.training import build as build_lib
from soup_jax.training import state as train_state
from soup_jax.training import step as train_step
from soup_jax.training.build import make_mesh


def read_config(path, overrides=()):
    """The config of a file with `--config.section.field=value` arguments applied."""
    cfg = runpy.run_path(path)["get_config"]()
    override(cfg, overrides)
    return cfg


def override(cfg, arguments):
    """Apply `--config.section.field=value` arguments."""
    fields = {}
    for argument in arguments:
        name, equals, value = argument.removeprefix("--config.").partition("=")
        if not argument.startswith("--config.") or not equals:
            raise SystemExit(f"unknown argument {argument!r}; fields are --config.NAME=VALUE")
        try:
            fields[name] = ast.literal_eval(value)
        except (SyntaxError, ValueError):
            fields[name] = value
    cfg.update_from_flattened_dict(fields)


@dataclasses.dataclass
class Training:
    """State and metrics that `advance` replaces, and what they were built from."""

    cfg: Any
    abstract: AbstractStep
    state: train_state.TrainState
    sums: dict
    batch: Batch

    def advance(self):
        """One step, dispatched."""
        self.state, self.sums = self.abstract.function(self.state, self.sums, self.batch)


def build(cfg):
    """A Training on all devices, from the config's seed."""
    config_lib.check(cfg)
    step = abstract_step(cfg, make_mesh(cfg))
    frequencies = np.full(cfg.num_domains, 1 / cfg.num_domains)
    init = train_state.make_init(
        build_lib.soup_config(cfg),
        build_lib.optimizer_config(cfg),
        step.model,
        seed=cfg.seed,
        frequencies_K=frequencies,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, step.state)
    rng = np.random.default_rng(0)
    shape = (cfg.batch_size, cfg.seq_len + 1)
    batch = Batch(
        rows={
            "tokens": rng.integers(0, cfg.vocab_size, shape).astype(np.int32),
            "num_targets": np.full(cfg.batch_size, cfg.seq_len, np.int32),
        },
        domain_B=rng.integers(0, cfg.num_domains, cfg.batch_size).astype(np.int32),
        h_MK=rng.dirichlet(np.ones(cfg.num_domains), cfg.num_mixtures).astype(np.float32),
    )
    return Training(
        cfg=cfg,
        abstract=step,
        state=jax.jit(init, out_shardings=shardings)(),
        sums=jax.device_put(
            train_step.zero_metrics(cfg.num_domains), sharding.replicated(step.mesh)
        ),
        batch=loader.to_device(batch, step.mesh),
    )
