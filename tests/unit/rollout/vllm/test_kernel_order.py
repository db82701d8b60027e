"""The order of vLLM's CPU kernel is found, and entries go to and come from their places."""

from __future__ import annotations

import pytest
import torch
from vllm._custom_ops import cpu_prepack_moe_weight
from vllm.platforms import current_platform

from megatron_r1.rollout.vllm import kernel_order
from megatron_r1.rollout.vllm.kernel_order import KernelOrder, find_order

current_platform.import_kernels()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 96), (192, 64)])
def test_what_is_written_is_what_the_kernel_packs(shape, dtype):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    packed = cpu_prepack_moe_weight(matrix[None], "vec").flatten()
    order, memory = find_order(*shape, dtype, "vec"), torch.zeros(matrix.numel(), dtype=dtype)
    for rows in (slice(0, 33), slice(33, 40), slice(40, shape[0])):  # across and within blocks
        for columns in (slice(0, 7), slice(7, 8), slice(8, 32), slice(32, shape[1])):  # across and within groups
            order.write(memory, rows.start, columns.start, matrix[rows, columns])
    assert torch.equal(memory, packed)
    assert torch.equal(order.read(packed, 0, 0, *shape), matrix)
    assert torch.equal(order.read(packed, 30, 3, 9, 14), matrix[30:39, 3:17])


@pytest.mark.parametrize(("block", "group"), [(16, 2), (32, 1), (4, 4), (1, 1)])
def test_places_are_those_of_the_formula(block, group):
    order = KernelOrder(8, block, group)
    places = order.places(0, 0, 32, 8)
    assert sorted(places.flatten().tolist()) == list(range(256))
    matrix = torch.arange(256, dtype=torch.int16).view(32, 8)
    memory = torch.zeros(256, dtype=torch.int16)
    order.write(memory, 0, 0, matrix)
    assert torch.equal(memory[places], matrix)


def test_an_unknown_order_is_refused(monkeypatch):
    monkeypatch.setattr(kernel_order, "_pack_positions", lambda rows, columns, *_: torch.arange(rows * columns).flip(0))
    with pytest.raises(RuntimeError, match="packed for odd is unknown"):
        find_order(32, 16, torch.float32, "odd")
