"""Attention on a CPU whose values have another width than keys: torch's own bits, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore import layers


@pytest.mark.parametrize("tokens", [1, 41])
@pytest.mark.parametrize("scale", [None, 0.13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unfused_attention_has_torchs_bits(tokens, scale, dtype):
    generator = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(3, 2, tokens, width, generator=generator).to(dtype) for width in (96, 96, 32, 32))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, scale=scale)
    found = layers._attend_unfused(*inputs, scale)
    assert torch.equal(found, expected)
    own, torchs = (torch.autograd.grad(output, inputs, gradient) for output in (found, expected))
    assert all(torch.equal(*pair) for pair in zip(own, torchs, strict=True))
