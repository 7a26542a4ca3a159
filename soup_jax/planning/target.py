"""The devices that a plan is made for: a TPU topology, a named chip, or what is present.

libtpu knows a TPU topology and compiles for it without a TPU. CPU devices stand in for GPUs that
are not present, one for one; they only give shapes and collectives.
"""

import dataclasses
import importlib.util
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from soup_jax.errors import UserError
from soup_jax.hardware import chips
from soup_jax.hardware.chips import Chip

TOPOLOGY_EXAMPLES = ("v4:2x2x4", "v5e:1x1", "v5e:4x4", "v5e:8x8", "v5p:4x4x4", "v6e:4x4")


@dataclasses.dataclass(frozen=True)
class Target:
    """What to plan for.

    Attributes:
      chip: its data sheet.
      name: for the output, as in "16 x v5e (v5e:4x4)".
      devices: what the program is compiled for.
      approximate: what is known if they only stand in for the chips; "" if they are these.
    """

    chip: Chip
    name: str
    devices: Sequence[Any]
    approximate: str = ""


def find_target(
    cfg: ConfigDict,
    *,
    topology: str = "",
    num_slices: int = 1,
    chip: str = "",
    num_devices: int = 0,
) -> Target:
    """The devices to plan for: a TPU topology, a named chip, or what is present.

    Args:
      num_slices: of that topology, joined by the data-centre network.

    Raises:
      UserError: an unknown topology or chip; libtpu is missing; or the devices are not those that
        the config's mesh section asks for.
    """
    if topology and (chip or num_devices):
        raise UserError("--topology names chips and their number; leave --chip/--num_devices out")
    if num_slices > 1 and not topology:
        raise UserError("--slices counts those of --topology: name it, as in --topology=v5e:4x4")
    if topology:
        target = _tpu_slices(topology, num_slices)
    elif chip:
        target = _chips(chips.find(chip), num_devices or cfg.mesh.num_devices or 1)
    else:
        target = _present(num_devices)
    if cfg.mesh.platform and cfg.mesh.platform != target.chip.platform:
        raise UserError(
            f"mesh.platform = {cfg.mesh.platform!r}, but {target.chip.name} is a "
            f"{target.chip.platform}: set --config.mesh.platform='' or plan for another chip"
        )
    return target


def _tpu_slices(topology: str, num_slices: int) -> Target:
    generation, _, shape = topology.partition(":")
    known = [c.name for c in chips.CHIPS if c.platform == "tpu"]
    if generation not in known or not re.fullmatch(r"\d+(x\d+){1,2}", shape):
        raise UserError(
            f"unknown topology {topology!r}; it is CHIP:SHAPE with a chip of {known}, as in "
            f"{', '.join(TOPOLOGY_EXAMPLES)}"
        )
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "--topology needs the TPU compiler, libtpu (Linux x86-64): "
            "pip install -e '.[plan]' in a checkout, or plan with --chip and --num_devices"
        )
    os.environ.update(_quiet_libtpu(os.environ))
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": num_slices} if num_slices > 1 else {}
    if generation == "v4":  # one device per chip, as on a TPU VM, not one per core
        options["chip_config_name"] = "megacore"
    if set(shape.split("x")) == {"1"}:  # libtpu takes the hosts of a slice to have four chips
        options["chips_per_host_bounds"] = [1, 1, 1]
    try:
        slice_ = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (RuntimeError, ValueError) as e:
        raise UserError(
            f"libtpu does not know the topology {topology!r} ({str(e).splitlines()[0]}); "
            f"examples are {', '.join(TOPOLOGY_EXAMPLES)}"
        ) from e
    devices = slice_.devices
    shown = f"{num_slices} x {topology}" if num_slices > 1 else topology
    return Target(chips.find(generation), f"{len(devices)} x {generation} ({shown})", devices)


def _quiet_libtpu(environment: Mapping[str, str]) -> dict[str, str]:
    # libtpu asks the cloud's metadata server where it is, and complains on every other machine; it
    # also refuses to be loaded twice on one. Nothing here touches a TPU. What is set stays.
    wanted = {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_STDERR_LOG_LEVEL": "3",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    }
    return {name: value for name, value in wanted.items() if name not in environment}


def _chips(chip: Chip, count: int) -> Target:
    name = f"{count} x {chip.name}"
    if chip.platform != "tpu":  # jax tries a TPU first where libtpu is installed
        os.environ.update(_quiet_libtpu(os.environ))
    forced = f"--xla_force_host_platform_device_count={count}"
    flags = os.environ.get("XLA_FLAGS", "")
    if "xla_force_host_platform_device_count" not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {forced}".strip()  # read when jax starts its backends
    present = jax.devices()
    if chips.from_kind(present[0].device_kind) == chip and len(present) >= count:
        return Target(chip, name, present[:count])
    cpus = jax.devices("cpu")
    if len(cpus) < count:
        raise UserError(
            f"jax has {len(cpus)} CPU devices here, {count} are needed in place of {name}: "
            f"set XLA_FLAGS={forced}"
        )
    why = (
        f"no {chip.name} and no compiler for it is here. The state is exact, activations are not "
        "known"
    )
    if count > 1:
        why += f"; collectives are those of a program for {count} CPU devices"
    return Target(chip, name, cpus[:count], why)


def _present(num_devices: int) -> Target:
    devices = jax.devices()
    chip = chips.from_kind(devices[0].device_kind)
    if chip is None:
        raise UserError(
            f"nothing is known of the devices found here ({devices[0].device_kind}): name others "
            "with --topology=v5e:4x4, or with --chip=H200 --num_devices=8"
        )
    if num_devices > len(devices):
        raise UserError(f"there are {len(devices)} devices here; name --chip to plan for more")
    devices = devices[: num_devices or None]
    return Target(chip, f"{len(devices)} x {chip.name} (present)", devices)
