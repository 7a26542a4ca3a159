"""What a run's config asks for: the settings that the method, the network and the mesh take.

The packages below know nothing of a run's config; this is the one place that reads it for them.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax import tree
from soup_jax.data import meta_distribution
from soup_jax.data.corpus import Corpus
from soup_jax.data.domain_map import DomainMap
from soup_jax.data.sampling import SamplingPlan
from soup_jax.errors import UserError
from soup_jax.hardware import mesh as mesh_lib
from soup_jax.models import base as models
from soup_jax.models.base import BaseModel, ModelSettings
from soup_jax.optim.bank import bank_optimizer
from soup_jax.optim.config import OptimizerConfig
from soup_jax.optim.shared import shared_optimizer
from soup_jax.shapes import Params
from soup_jax.soup import SoupConfig
from soup_jax.soup.bank import parse_rule
from soup_jax.training.state import TrainState, make_init


def soup_config(cfg: ConfigDict) -> SoupConfig:
    """The soup of a config.

    Raises:
      UserError: a rule for experts that does not exist.
    """
    for _, rule in cfg.experts.rules:
        try:
            parse_rule(rule)
        except UserError as e:
            raise UserError(f"config: experts.rules: {e}") from e
    return SoupConfig(
        num_domains=cfg.num_domains,
        num_experts=cfg.num_experts,
        rules=cfg.experts.rules,
        init_scale=cfg.experts.init_scale,
        bank_dtype=cfg.experts.dtype,
        compute_dtype=cfg.model.dtype,
        router_hidden_dim=cfg.router.hidden_dim,
        router_init=cfg.router.init,
        router_center=cfg.router.center,
        router_normalization=cfg.router.normalization,
        router_scale=cfg.router.scale,
    )


def check_rules(cfg: ConfigDict, params: Params) -> None:
    """Refuse rules for experts that no leaf of a soup's `params` has, which older runs may have.

    Raises:
      UserError: names the rule and the leaves.
    """
    if cfg.num_experts:
        tree.check_rules_used(cfg.experts.rules, list(tree.flatten(params["shared"])))


def optimizer_config(cfg: ConfigDict) -> OptimizerConfig:
    """The optimizers of a config.

    Raises:
      UserError: one that does not exist, or does not take its arguments.
    """
    o = cfg.optimizer
    config = OptimizerConfig(
        learning_rate=o.learning_rate,
        num_steps=cfg.num_steps,
        schedule=o.schedule,
        warmup_steps=o.warmup_steps,
        decay_steps=o.decay_steps,
        final_fraction=o.final_fraction,
        shared=o.shared,
        shared_args=o.shared_args,
        bank=o.bank,
        bank_lr_scale=o.bank_lr_scale,
        bank_step_bound=o.bank_step_bound,
        router_lr_scale=o.router_lr_scale,
        beta1=o.beta1,
        beta2=o.beta2,
        eps=o.eps,
        weight_decay=o.weight_decay,
        clip_norm=o.clip_norm,
        moment_dtype=o.moment_dtype,
        stochastic_rounding=cfg.experts.rounding == "stochastic",
    )
    shared_optimizer(config)
    bank_optimizer(config)
    return config


def model_settings(cfg: ConfigDict) -> ModelSettings:
    """What a config says to its base network."""
    return ModelSettings.from_mapping(cfg.model, vocab_size=cfg.vocab_size, seq_len=cfg.seq_len)


def base_model(cfg: ConfigDict) -> BaseModel:
    """The base network of a config.

    Raises:
      UserError: no such network, or settings that it refuses.
    """
    return models.make(cfg.model.kind, model_settings(cfg))


def initial_state(
    cfg: ConfigDict, model: BaseModel, domains: DomainMap
) -> Callable[..., TrainState]:
    """How a run of a config begins: for `jax.jit`, or `jax.eval_shape` for its structure alone. It
    may be given another seed than the config's.

    Raises:
      UserError: as `soup_config` and `optimizer_config` raise it.
    """
    return make_init(
        soup_config(cfg),
        optimizer_config(cfg),
        model,
        seed=cfg.seed,
        frequencies_K=domains.domain_frequencies,
        centroids_KC=domains.centroids() if cfg.router.init == "centroids" else None,
    )


def sampling_plan(cfg: ConfigDict, corpus: Corpus) -> SamplingPlan:
    """What a run draws at each step.

    Raises:
      UserError: as `meta_distribution.from_config`.
    """
    return SamplingPlan(
        meta_distribution.from_config(cfg, corpus.domain_frequencies),
        num_windows_K=np.diff(corpus.offsets["train"]),
        batch_size=cfg.batch_size,
        num_mixtures=cfg.num_mixtures,
        seed=cfg.seed,
        skip=cfg.skip_batches,
    )


def num_groups(cfg: ConfigDict) -> int:
    """Mixtures that get a merged model of their own: M, or 1 without experts."""
    return cfg.num_mixtures if cfg.num_experts else 1


def mesh_config(cfg: ConfigDict) -> mesh_lib.MeshConfig:
    """The mesh that a config asks for, and the sizes that it has to divide."""
    groups = num_groups(cfg)
    return mesh_lib.MeshConfig(
        num_groups=groups,
        rows_per_group=cfg.batch_size // groups // cfg.optimizer.grad_accumulation,
        replica=cfg.mesh.replica,
        fsdp=cfg.mesh.fsdp,
        platform=cfg.mesh.platform,
        num_devices=cfg.mesh.num_devices,
    )


def make_mesh(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (replica, fsdp) mesh of a config; UserError as `mesh.make_mesh` raises it."""
    return mesh_lib.make_mesh(mesh_config(cfg), devices)
