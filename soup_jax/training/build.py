"""What a config asks for, as the plain settings that the packages below take."""

from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax.hardware import mesh as mesh_lib


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
