"""What the vendors' data sheets say of accelerators; no other module holds such numbers.

Rates are peaks: a real step reaches a part of each. Interconnect is what one chip sends in one
direction: all links of a TPU's torus together, or half of an NVLink total that counts both ways. A
job with more GPUs than one NVLink domain holds is bound by the network between domains instead.

Cards of one family differ by up to a half in bandwidth, so names match only as a whole: a card that
is not listed is unknown, and does not count as its nearest relative.
"""

import dataclasses
from typing import Any

from soup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: what users call it.
      kinds: jax's `device_kind`s that mean it.
      platform: "tpu" or "gpu".
      memory_gb: the data sheet's number, taken as 10^9 bytes. The chips have that many GiB: the
        difference of 7% is what the runtime and fragmentation may use.
      peak_tflops: dense bfloat16, 10^12 operations a second.
      float32_tflops: of products whose operands are float32; TPUs take six passes in bfloat16.
      memory_gbs: bandwidth of its memory, 10^9 bytes a second.
      interconnect_gbs: to its neighbours, 10^9 bytes a second in one direction.
      domain: GPUs that share NVLink; 0: the interconnect spans the whole slice.
      network_gbs: of one chip to other domains or slices, 10^9 bytes a second in one direction; 0:
        not known.
      aliases: other names that users may give.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    memory_gb: float
    peak_tflops: float
    float32_tflops: float
    memory_gbs: float
    interconnect_gbs: float
    domain: int = 0
    network_gbs: float = 0.0
    aliases: tuple[str, ...] = ()

    def exchange_gbs(self, num_devices: int) -> float:
        """Rate of an exchange among all of `num_devices` chips."""
        inside = not self.domain or num_devices <= self.domain
        return self.interconnect_gbs if inside else self.network_gbs

    @property
    def all_names(self) -> tuple[str, ...]:
        """Name, aliases and device kinds."""
        return (self.name, *self.aliases, *self.kinds)


def _gpu(name: str, kinds: tuple[str, ...], *numbers: float, aliases: tuple[str, ...] = ()) -> Chip:
    domain, network = numbers[-2:]
    rates: Any = numbers[:-2]
    kinds = tuple(f"NVIDIA {kind}" for kind in kinds)
    rest: dict[str, Any] = {"domain": int(domain), "network_gbs": network, "aliases": aliases}
    return Chip(name, kinds, "gpu", *rates, **rest)


_H100_SXM = ("H100-SXM", "H100-80GB")

# Networks: what the vendor's own servers have, one 200 or 400 Gbit/s adapter a GPU; of TPUs, what
# the cloud's pages give a pod or a chip of the data-centre network. The PCIe cards
# A100 and H100 are taken without NVLink bridges: their bus is their interconnect.
CHIPS = (
    Chip("v4", ("TPU v4",), "tpu", 32, 275, 275 / 6, 1228, 300),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 16, 197, 197 / 6, 819, 200, 0, 3.125),
    Chip("v5p", ("TPU v5p", "TPU v5"), "tpu", 95, 459, 459 / 6, 2765, 600, 0, 6.25),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 32, 918, 918 / 6, 1640, 448, 0, 12.5),
    _gpu("A100-40GB", ("A100-SXM4-40GB",), 40, 312, 19.5, 1555, 300, 8, 25, aliases=("A100-40",)),
    _gpu("A100-80GB", ("A100-SXM4-80GB",), 80, 312, 19.5, 2039, 300, 8, 25, aliases=("A100-80",)),
    _gpu("A100-PCIe-40GB", ("A100-PCIE-40GB",), 40, 312, 19.5, 1555, 32, 8, 25),
    _gpu("A100-PCIe-80GB", ("A100 80GB PCIe",), 80, 312, 19.5, 1935, 32, 8, 25),
    _gpu("H100", ("H100 80GB HBM3",), 80, 989, 67, 3350, 450, 8, 50, aliases=_H100_SXM),
    _gpu("H100-PCIe", ("H100 PCIe",), 80, 756, 51, 2000, 64, 8, 50),
    _gpu("H100-NVL", ("H100 NVL",), 94, 835, 60, 3900, 300, 2, 50),
    _gpu("H200", ("H200",), 141, 989, 67, 4800, 450, 8, 50, aliases=("H200-SXM",)),
    _gpu("H200-NVL", ("H200 NVL",), 141, 835, 60, 4800, 450, 4, 50),
    _gpu("GH200-96GB", ("GH200 480GB",), 96, 989, 67, 4000, 450, 1, 50),
    _gpu("GH200-144GB", ("GH200 144G HBM3e",), 144, 989, 67, 4900, 450, 1, 50),
    _gpu("B200", ("B200",), 180, 2250, 75, 8000, 900, 8, 50),
    _gpu("GB200", ("GB200",), 186, 2500, 80, 8000, 900, 72, 50),
)


def find(name: str) -> Chip:
    """The chip of that name, alias or device kind, upper or lower case.

    Raises:
      UserError: no such chip; the known ones are listed.
    """
    for chip in CHIPS:
        if name.lower() in (known.lower() for known in chip.all_names):
            return chip
    raise UserError(f"unknown chip {name!r}; known are {', '.join(c.name for c in CHIPS)}")


def from_kind(device_kind: str) -> Chip | None:
    """The chip of a jax `device_kind`; None if not known."""
    return next((chip for chip in CHIPS if device_kind in chip.kinds), None)
