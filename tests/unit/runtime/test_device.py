"""What is said of a processor before anything is computed on it."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.runtime.device import warn_of_slow_bf16


@pytest.mark.parametrize("capability", ["avx512_bf16", "amx_bf16", "bf16", "sve_bf16"])
def test_only_bf16_without_instructions_is_warned_of(capability: str) -> None:
    assert warn_of_slow_bf16("bf16", {"avx2": True, capability: True}) is None
    assert "no bf16 instructions" in warn_of_slow_bf16("bf16", {"avx512_f": True, capability: False})
    assert warn_of_slow_bf16("fp32", {}) is None


def test_torch_names_capabilities_as_they_are_asked_for() -> None:
    names = torch.cpu.get_capabilities()
    assert "avx512_bf16" in names or "bf16" in names
