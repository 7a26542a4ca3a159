"""What the vendors' data sheets say of the accelerators that soups are trained on; one place.

Rates are peaks: a real step reaches a part of each. Interconnect is what one chip sends in one
direction: all links of a TPU's torus together, or half of an NVLink total that counts both ways. A
job with more GPUs than one NVLink domain holds is bound by the network between domains instead.
"""

import dataclasses

from soup_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: what users call it.
      kinds: substrings of jax's `device_kind` that mean it.
      platform: "tpu" or "gpu".
      memory_gb: the data sheet's number, taken as 10^9 bytes. The chips have that many GiB: the
        difference of 7% is what the runtime and fragmentation may use.
      peak_tflops: dense bfloat16, 10^12 operations a second.
      memory_gbs: bandwidth of its memory, 10^9 bytes a second.
      interconnect_gbs: to its neighbours, 10^9 bytes a second in one direction.
      domain: GPUs that share NVLink; 0: the interconnect spans the whole slice.
      network_gbs: of one GPU to other domains, 10^9 bytes a second in one direction.
    """

    name: str
    kinds: tuple[str, ...]
    platform: str
    memory_gb: float
    peak_tflops: float
    memory_gbs: float
    interconnect_gbs: float
    domain: int = 0
    network_gbs: float = 0.0

    def exchange_gbs(self, num_devices: int) -> float:
        """Rate of an exchange among all of `num_devices` chips."""
        inside = not self.domain or num_devices <= self.domain
        return self.interconnect_gbs if inside else self.network_gbs


# Networks: what the vendor's own servers have, one 200 or 400 Gbit/s adapter a GPU.
CHIPS = (
    Chip("v4", ("TPU v4",), "tpu", 32, 275, 1228, 300),
    Chip("v5e", ("TPU v5 lite", "TPU v5e"), "tpu", 16, 197, 819, 200),
    Chip("v5p", ("TPU v5p", "TPU v5"), "tpu", 95, 459, 2765, 600),
    Chip("v6e", ("TPU v6 lite", "TPU v6e"), "tpu", 32, 918, 1640, 448),
    Chip("A100-40GB", ("A100-SXM4-40GB", "A100-PCIE-40GB"), "gpu", 40, 312, 1555, 300, 8, 25),
    Chip("A100-80GB", ("A100",), "gpu", 80, 312, 2039, 300, 8, 25),
    Chip("H100", ("H100",), "gpu", 80, 989, 3350, 450, 8, 50),
    Chip("H200", ("H200",), "gpu", 141, 989, 4800, 450, 8, 50),
    Chip("B200", ("B200",), "gpu", 180, 2250, 8000, 900, 8, 50),
)


def find(name: str) -> Chip:
    """The chip of that name, upper or lower case.

    Raises:
      UserError: no such chip; the known ones are listed.
    """
    for chip in CHIPS:
        if chip.name.lower() == name.lower():
            return chip
    raise UserError(f"unknown chip {name!r}; known are {', '.join(c.name for c in CHIPS)}")


def from_kind(device_kind: str) -> Chip | None:
    """The chip of a jax `device_kind`, by the longest matching substring; None if not known."""
    matches = [(len(k), chip) for chip in CHIPS for k in chip.kinds if k in device_kind]
    return max(matches, key=lambda m: m[0])[1] if matches else None
