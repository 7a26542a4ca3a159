"""The device mesh, built in one place.

Two axes. `replica` counts the groups of devices that work on different mixtures; `fsdp` the
devices inside a group, which share the rows of their mixtures. State is sliced over both.
"""

import dataclasses
import logging
import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh

from soup_jax.errors import UserError

_log = logging.getLogger(__name__)

AXES = ("replica", "fsdp")


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """A mesh that is asked for.

    Attributes:
      num_groups: merged models of a step; divides over `replica`.
      rows_per_group: rows of a micro-batch of one of them; divide over `fsdp`.
      replica: groups of devices that hold different mixtures; -1: as many as fit.
      fsdp: devices inside such a group; -1: the rest.
      platform: cpu, gpu or tpu; anything else found is an error. Empty: any.
      num_devices: how many are expected; 0: what is there.
    """

    num_groups: int
    rows_per_group: int
    replica: int = -1
    fsdp: int = -1
    platform: str = ""
    num_devices: int = 0


def device_table(devices: list[jax.Device]) -> str:
    """One line per process: its devices and their kind."""
    by_process: dict[int, list[jax.Device]] = {}
    for device in devices:
        by_process.setdefault(device.process_index, []).append(device)
    return "\n".join(
        f"  process {process}: {len(group)} x {group[0].platform} ({group[0].device_kind})"
        for process, group in sorted(by_process.items())
    )


def make_mesh(cfg: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The (replica, fsdp) mesh over `devices` (default: all of them).

    Devices of one slice, which a fast network joins, lie side by side: as long as `fsdp` divides a
    slice, a group of devices stays inside it, and slices have different mixtures. On TPUs `fsdp`
    runs along links of the torus, where the sizes allow it.

    Raises:
      UserError: the platform or the number of devices is not what is asked for, or the sizes do
        not multiply to it, or groups and rows do not divide over them.
    """
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda d: getattr(d, "slice_index", 0)
    )
    count = len(devices)
    if cfg.platform and devices[0].platform != cfg.platform:
        raise UserError(
            f"mesh.platform = {cfg.platform!r}, but jax found {devices[0].platform!r}:\n"
            f"{device_table(devices)}\nInstall soup_jax[{cfg.platform}] or set the field to ''"
        )
    if cfg.num_devices and cfg.num_devices != count:
        raise UserError(
            f"mesh.num_devices = {cfg.num_devices}, but jax found {count}:\n{device_table(devices)}"
        )
    replica, fsdp = cfg.replica, cfg.fsdp
    if replica == -1:
        replica = count // fsdp if fsdp > 0 else math.gcd(cfg.num_groups, count)
    if fsdp == -1:
        fsdp = count // max(replica, 1)
    if replica < 1 or fsdp < 1 or replica * fsdp != count:
        raise UserError(
            f"mesh.replica x mesh.fsdp = {replica} x {fsdp} is not the device count {count}"
        )
    if cfg.num_groups % replica:
        raise UserError(
            f"{cfg.num_groups} mixtures do not divide over mesh.replica = {replica} device groups; "
            "without experts there is one (set mesh.replica to 1 or -1)"
        )
    if cfg.rows_per_group % fsdp:
        raise UserError(
            f"the {cfg.rows_per_group} rows of a micro-batch of one mixture (batch_size / mixtures "
            f"/ grad_accumulation) do not divide over mesh.fsdp = {fsdp} devices"
        )
    return Mesh(_arranged(devices, replica, fsdp), AXES)


def _arranged(devices: list[jax.Device], replica: int, fsdp: int) -> np.ndarray:
    slices = len({getattr(d, "slice_index", 0) for d in devices})
    if devices[0].platform != "tpu" or replica % slices:
        return np.asarray(devices).reshape(replica, fsdp)
    shape, parts = (replica // slices, fsdp), np.asarray(devices).reshape(slices, -1)
    split = {"allow_split_physical_axes": True}
    try:
        return np.concatenate(
            [mesh_utils.create_device_mesh(shape, list(part), **split) for part in parts]
        )
    except (AssertionError, NotImplementedError) as e:  # chips that are no box, sizes that fit none
        _log.warning(
            "groups of mesh.fsdp = %d devices do not lie along links of the chips; those of "
            "another size may (%s)",
            fsdp,
            e,
        )
        return np.asarray(devices).reshape(replica, fsdp)
