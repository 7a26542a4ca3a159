"""The device mesh, built in one place.

Two axes. `replica` counts the groups of devices that work on different mixtures; `fsdp` the
devices inside a group, which share the rows of their mixtures. State is sliced over both.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from soup_jax.errors import UserError

AXES = ("replica", "fsdp")


def device_table(devices: list[jax.Device]) -> str:
    """One line per process: its devices and their kind."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    return "\n".join(
        f"  process {process}: {len(group)} x {group[0].platform} ({group[0].device_kind})"
        for process, group in sorted(by_process.items())
    )


def num_groups(cfg: ConfigDict) -> int:
    """Mixtures that get a merged model of their own: M, or 1 without experts."""
    return cfg.num_mixtures if cfg.num_experts else 1


def make_mesh(cfg: ConfigDict, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (replica, fsdp) mesh of the config over `devices` (default: all of them).

    Raises:
      UserError: the platform or the number of devices is not what the config asks for, or the
        sizes do not multiply to it, or the mixtures do not divide over the replicas.
    """
    devices = list(jax.devices() if devices is None else devices)
    count = len(devices)
    if cfg.mesh.platform and devices[0].platform != cfg.mesh.platform:
        raise UserError(
            f"mesh.platform = {cfg.mesh.platform!r}, but jax found {devices[0].platform!r}:\n"
            f"{device_table(devices)}\nInstall soup_jax[{cfg.mesh.platform}] or set the field to ''"
        )
    if cfg.mesh.num_devices and cfg.mesh.num_devices != count:
        raise UserError(
            f"mesh.num_devices = {cfg.mesh.num_devices}, but jax found {count}:\n"
            f"{device_table(devices)}"
        )
    groups = num_groups(cfg)
    replica, fsdp = cfg.mesh.replica, cfg.mesh.fsdp
    if replica == -1:
        replica = count // fsdp if fsdp > 0 else math.gcd(groups, count)
    if fsdp == -1:
        fsdp = count // max(replica, 1)
    if replica < 1 or fsdp < 1 or replica * fsdp != count:
        raise UserError(
            f"mesh.replica x mesh.fsdp = {replica} x {fsdp} is not the device count {count}"
        )
    if groups % replica:
        raise UserError(
            f"{groups} mixtures do not divide over mesh.replica = {replica} device groups; "
            "without experts there is one (set mesh.replica to 1 or -1)"
        )
    rows = cfg.batch_size // groups // cfg.optimizer.grad_accumulation
    if rows % fsdp:
        raise UserError(
            f"the {rows} rows of a micro-batch of one mixture (batch_size / mixtures / "
            f"grad_accumulation) do not divide over mesh.fsdp = {fsdp} devices"
        )
    return Mesh(np.asarray(devices).reshape(replica, fsdp), AXES)
