"""Devices that a plan can be made for: what they could do at most, and which share of that programs get out of them.

docs/cluster.md has the sources of the first kind of number. The second kind is one set a device, the same for all models, layouts
and phases: fitted to the published runs that `benchmarks/published` names as fitted, none to a single row. An A100 has Hopper's
shares, and so have memory and network of every device: too few of the rows are bound by them.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError
from megatron_r1.runtime.device_peaks import bf16_peak

CPU = "cpu"  #: no accelerator: ranks share the memory of their node

_MIB = 2**20
_GB = 1e9


@dataclass(frozen=True)
class Efficiency:
    """Shares of a device's peaks that long calls of good kernels reach, and the time of short ones."""

    gemm: float  #: of dense BF16 FLOPS, large matrix products
    fp8_gemm: float  #: of dense FP8 FLOPS, quantizing included
    grouped: float  #: of dense FLOPS of either kind, relative to `gemm`: products of experts, many small ones in a call
    attention: float  #: of dense BF16 FLOPS, attention of packed sequences, forward and backward
    memory: float  #: of the memory's bandwidth, in training and decoding alike
    nvlink: float  #: of a link inside a node, collectives and all-to-all
    network: float  #: of a link between nodes


@dataclass(frozen=True)
class Accelerator:
    """One device of a rank. Rates are per second; of a link, in one direction."""

    name: str
    memory_bytes: int  #: that the driver shows of a device
    fp8_flops: float | None  #: dense; None: it has no FP8
    memory_bandwidth: float  #: bytes
    nvlink: float  #: bytes between two devices of a domain
    domain: int  #: devices that NVLink joins
    network: float  #: bytes between nodes, of one device's share of its node's links
    efficiency: Efficiency

    @property
    def bf16_flops(self) -> float:
        """Dense, from the table that MFU is computed with."""
        flops = bf16_peak(self.name)
        assert flops is not None, self.name  # the tests hold the tables together
        return flops

    def gemm_flops(self, *, fp8: bool = False, grouped: bool = False) -> float:
        """FLOPS that large matrix products reach.

        Raises:
            ConfigError: FP8 on a device that has none.
        """
        if fp8 and self.fp8_flops is None:
            raise ConfigError(f"megatron.fp8: a {self.name} has no FP8; leave it out, or plan for H100 or later")
        reached = (self.fp8_flops or 0) * self.efficiency.fp8_gemm if fp8 else self.bf16_flops * self.efficiency.gemm
        return reached * (self.efficiency.grouped if grouped else 1)

    @property
    def attention_flops(self) -> float:
        """FLOPS that attention reaches."""
        return self.bf16_flops * self.efficiency.attention

    @property
    def memory_rate(self) -> float:
        """Bytes that kernels read or write."""
        return self.memory_bandwidth * self.efficiency.memory

    def link_rate(self, spans_nodes: bool) -> float:
        """Bytes that a device sends inside its domain or out of it."""
        return self.network * self.efficiency.network if spans_nodes else self.nvlink * self.efficiency.nvlink


_HOPPER = Efficiency(gemm=0.66, fp8_gemm=0.58, grouped=0.95, attention=0.48, memory=0.8, nvlink=0.45, network=0.65)
_H20 = Efficiency(gemm=0.88, fp8_gemm=0.77, grouped=0.8, attention=0.7, memory=0.8, nvlink=0.55, network=0.65)
_BLACKWELL = Efficiency(gemm=0.42, fp8_gemm=0.43, grouped=0.7, attention=0.4, memory=0.8, nvlink=0.57, network=0.65)
_AMPERE = Efficiency(gemm=0.66, fp8_gemm=0.0, grouped=0.95, attention=0.48, memory=0.8, nvlink=0.55, network=0.65)

#: Memory: what nvidia-smi shows as the total of one device.
DEVICES = {
    device.name: device
    for device in (
        Accelerator("A100", 81_920 * _MIB, None, 2039 * _GB, 300 * _GB, 8, 25 * _GB, _AMPERE),
        Accelerator("H20", 97_871 * _MIB, 296e12, 4000 * _GB, 450 * _GB, 8, 50 * _GB, _H20),
        Accelerator("H800", 81_559 * _MIB, 1979e12, 3350 * _GB, 200 * _GB, 8, 50 * _GB, _HOPPER),
        Accelerator("H100", 81_559 * _MIB, 1979e12, 3350 * _GB, 450 * _GB, 8, 50 * _GB, _HOPPER),
        Accelerator("H200", 143_771 * _MIB, 1979e12, 4800 * _GB, 450 * _GB, 8, 50 * _GB, _HOPPER),
        Accelerator("B200", 183_359 * _MIB, 4500e12, 8000 * _GB, 900 * _GB, 8, 50 * _GB, _BLACKWELL),
        Accelerator("GB200", 189_471 * _MIB, 5000e12, 8000 * _GB, 900 * _GB, 72, 50 * _GB, _BLACKWELL),
    )
}


def device_named(name: str) -> Accelerator:
    """The device of this name, in any spelling of case. Raises ConfigError for one that is not in the table."""
    found = DEVICES.get(name.upper())
    if found is None:
        raise ConfigError(f"--gpu {name}: there is no such device in the table; it has {', '.join(DEVICES)}")
    return found
