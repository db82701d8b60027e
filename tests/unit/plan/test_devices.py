from __future__ import annotations

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.plan.devices import DEVICES, device_named
from megatron_r1.runtime.device_peaks import bf16_peak


def test_peaks_are_those_of_mfu_and_shares_are_shares() -> None:
    assert set(DEVICES) == {"A100", "H20", "H800", "H100", "H200", "B200", "GB200"}
    for device in DEVICES.values():
        assert device.bf16_flops == bf16_peak(f"NVIDIA {device.name}")
        assert all(0 <= share <= 1 for share in vars(device.efficiency).values())
        assert device.gemm_flops() < device.bf16_flops and device.gemm_flops(grouped=True) < device.gemm_flops()
        if device.fp8_flops is not None:
            assert device.fp8_flops == pytest.approx(2 * device.bf16_flops, rel=1e-3)
            assert device.gemm_flops(fp8=True) > device.gemm_flops()


def test_a_device_without_fp8_says_so() -> None:
    with pytest.raises(ConfigError, match=r"^megatron.fp8: a A100 has no FP8"):
        DEVICES["A100"].gemm_flops(fp8=True)


def test_an_unknown_device_is_one_line() -> None:
    assert device_named("h800") is DEVICES["H800"]
    with pytest.raises(ConfigError, match="--gpu V100: there is no such device in the table; it has A100, "):
        device_named("V100")


def test_a_link_between_nodes_is_slower() -> None:
    for device in DEVICES.values():
        assert device.link_rate(True) < device.link_rate(False)
