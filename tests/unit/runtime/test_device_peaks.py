"""Names that drivers give devices, and their peaks."""

from __future__ import annotations

import pytest

from megatron_r1.runtime.device import CPU
from megatron_r1.runtime.device_peaks import bf16_peak, peak_of


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989.5),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H800", 989.5),
        ("NVIDIA H200", 989.5),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA H20", 148),
        ("NVIDIA H20-3e", 148),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989.5),
    ],
)
def test_known_devices(name: str, tflops: float) -> None:
    assert bf16_peak(name) == tflops * 1e12


@pytest.mark.parametrize("name", ["NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA GeForce RTX 4090", "NVIDIA H2000", ""])
def test_no_peak_is_made_up(name: str) -> None:
    assert bf16_peak(name) is None


def test_a_cpu_has_none() -> None:
    assert peak_of(CPU, "bf16") is None
