"""What a device could do at most: the denominator of MFU."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_r1.runtime.device import Device

#: (words in the name that the driver gives a device, dense BF16 FLOPS of its tensor cores); the first entry that fits counts.
#: NVIDIA's data sheets state twice these numbers, "with sparsity", from Hopper on.
BF16_PEAKS: tuple[tuple[frozenset[str], float], ...] = (
    (frozenset({"A100"}), 312e12),  # NVIDIA A100 data sheet
    (frozenset({"A800"}), 312e12),  # A100's with a slower NVLink
    (frozenset({"H100", "PCIe"}), 756.5e12),  # NVIDIA H100 data sheet
    (frozenset({"H100", "NVL"}), 835.5e12),  # NVIDIA H100 data sheet
    (frozenset({"H100"}), 989.5e12),  # NVIDIA H100 data sheet, SXM
    (frozenset({"H800", "PCIe"}), 756.5e12),  # NVIDIA H800 data sheet
    (frozenset({"H800"}), 989.5e12),  # NVIDIA H800 data sheet, SXM: H100's with a slower NVLink
    (frozenset({"H200", "NVL"}), 835.5e12),  # NVIDIA H200 data sheet
    (frozenset({"H200"}), 989.5e12),  # NVIDIA H200 data sheet, SXM
    (frozenset({"GH200"}), 989.5e12),  # NVIDIA GH200 data sheet
    (frozenset({"H20"}), 148e12),  # NVIDIA publishes no data sheet; 148 TFLOPS is what sellers and clouds state alike
    (frozenset({"GB200"}), 2500e12),  # NVIDIA Blackwell data sheet, GB200 NVL72, one of its 72 GPUs
    (frozenset({"B200"}), 2250e12),  # NVIDIA Blackwell data sheet, HGX B200
)


@cache
def bf16_peak(name: str) -> float | None:
    """Dense BF16 FLOPS of the device that the driver calls `name`, as "NVIDIA H800" or "NVIDIA A100-SXM4-80GB".

    None: it is not in the table, or a slice of a device (MIG), whose share of the peak the name does not say.
    """
    words = frozenset(re.findall(r"[A-Za-z0-9]+", name))
    if "MIG" in words:
        return None
    return next((flops for needed, flops in BF16_PEAKS if needed <= words), None)


def peak_of(device: Device, dtype: str) -> float | None:
    """FLOPS that MFU is a share of; None if no peak is known: of a CPU, of another device, of `runtime.dtype=fp32`."""
    if device.kind == "cpu" or dtype != "bf16":
        return None
    import torch  # here: a plan, which asks for peaks alone, does without

    return bf16_peak(torch.cuda.get_device_name(device.torch_device))
