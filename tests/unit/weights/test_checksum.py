"""The checksum sees every bit and every position, and adds up over shards."""

import pytest
import torch

from megatron_r1.weights.checksum import MASK, checksum


@pytest.fixture
def tensor() -> torch.Tensor:
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(0))


def test_every_element_counts(tensor):
    seen = {checksum(tensor)}
    for i in range(tensor.numel()):
        changed = tensor.clone()
        changed.view(-1)[i] = torch.nextafter(changed.view(-1)[i], torch.tensor(9.0))
        seen.add(checksum(changed))
    assert len(seen) == tensor.numel() + 1


def test_every_position_counts(tensor):
    swaps = {checksum(tensor)}
    for i in range(tensor.numel()):
        for j in range(i):
            swapped = tensor.clone()
            swapped.view(-1)[i], swapped.view(-1)[j] = tensor.view(-1)[j], tensor.view(-1)[i]
            swaps.add(checksum(swapped))
    assert len(swaps) == 1 + 30 * 29 // 2
    assert checksum(tensor) != checksum(tensor.t())


def test_signed_zero_and_nan_are_bits():
    assert checksum(torch.tensor([0.0])) != checksum(torch.tensor([-0.0]))
    assert checksum(torch.tensor([float("nan"), 1.0])) == checksum(torch.tensor([float("nan"), 1.0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_shards_add_up(dtype):
    tensor = (torch.rand(8, 6, 4) * 200).to(dtype)
    rows = sum(checksum(tensor[i : i + 2], row_offset=i) for i in range(0, 8, 2))
    columns = sum(checksum(tensor[:, i : i + 3], column_offset=4 * i) for i in (0, 3))
    assert rows & MASK == columns & MASK == checksum(tensor)


def test_blocks_and_strides_do_not_matter(tensor, monkeypatch):
    whole = checksum(tensor)
    monkeypatch.setattr("megatron_r1.weights.checksum._BLOCK_ON_CPU", 7)
    assert checksum(tensor) == whole
    assert checksum(tensor.t().contiguous().t()) == whole


def test_value_is_pinned():
    """Exported checksums must not change between versions or devices."""
    assert checksum(torch.arange(12, dtype=torch.float32).reshape(3, 4)) == 10369776251402452992
