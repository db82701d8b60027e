"""Products with packed weights: right for any number of rows, and with the bits of the weight as it is now."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.rollout.vllm import packed_linear
from megatron_r1.rollout.vllm.packed_linear import PackedLinear, choose_linear, find_packed


def weight_of(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows), dtype=torch.float32).to(dtype)


@pytest.mark.parametrize("shape", [(577, 131), (64, 200)])
@pytest.mark.parametrize("rows", [(0,), (1,), (33,), (2, 5)])
def test_the_product_is_torchs(shape, rows):
    weight, bias = weight_of(*shape), torch.arange(shape[0], dtype=torch.float32)
    x = torch.randn(*rows, shape[1], generator=torch.Generator().manual_seed(0))
    linear = PackedLinear()
    for term in (bias, None):
        torch.testing.assert_close(linear(x, weight, term), torch.nn.functional.linear(x, weight, term), rtol=1e-5, atol=1e-4)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    torch.testing.assert_close(linear(strided, weight), torch.nn.functional.linear(x, weight), rtol=1e-5, atol=1e-4)


def test_a_weight_written_in_place_is_packed_again():
    weight, x = torch.nn.Parameter(weight_of(40, 30), requires_grad=False), torch.ones(3, 30)
    linear = PackedLinear()
    linear.pack()
    assert linear.is_current(), "nothing to compute with"
    linear(x, weight)
    assert linear.is_current()
    weight[7, 7] = weight[7, 7].nextafter(torch.tensor(9.0))
    assert not linear.is_current(), "one bit"
    linear.pack()
    assert linear.is_current()
    tied = torch.nn.Parameter(weight_of(41, 30), requires_grad=False)
    torch.testing.assert_close(linear(x, tied), x @ tied.T, rtol=1e-5, atol=1e-4)


def test_small_weights_and_other_shapes_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(packed_linear, "SMALLEST_PACKED", 30 * 40)
    assert choose_linear(weight_of(30, 40)) is not None
    assert choose_linear(weight_of(30, 39)) is None
    assert choose_linear(weight_of(30, 40).view(3, 10, 40)) is None
    assert choose_linear(weight_of(30, 40).to(torch.float64)) is None
    assert choose_linear(torch.empty(30, 40, device="meta")) is None


def test_packed_modules_are_found():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    model[0].cpu_linear, model[1].cpu_linear = PackedLinear(), torch.nn.functional.linear
    assert [name for name, _ in find_packed(model)] == ["0"]
