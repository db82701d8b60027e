"""Shifted by one place within every sequence, whichever rank has which part of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from megatron_r1.mcore.packing import local_token_indices
from megatron_r1.mcore.shift import shift_left

BOUNDS = torch.tensor([0, 12, 24, 60], dtype=torch.int32)


def group(size: int, rank: int) -> SimpleNamespace:
    return SimpleNamespace(size=lambda: size, rank=lambda: rank)


def shifted(values: torch.Tensor, bounds: torch.Tensor) -> torch.Tensor:
    """Sequence by sequence."""
    parts = values.split(bounds.diff().tolist(), -1)
    return torch.cat([torch.nn.functional.pad(part[..., 1:], (0, 1)) for part in parts], -1)


def test_one_rank() -> None:
    values = torch.arange(1, 61).view(1, -1)
    assert torch.equal(shift_left(values, BOUNDS, group(1, 0)), shifted(values, BOUNDS))
    assert torch.equal(shift_left(values, torch.stack([BOUNDS, BOUNDS]), group(1, 0)), shifted(values, BOUNDS))
    assert values[0, :3].tolist() == [1, 2, 3], "what was given is left alone"
    rows = values.view(3, 20).float()
    assert shift_left(rows, None, group(1, 0))[:, -2:].tolist() == [[20, 0], [40, 0], [60, 0]]


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("packed", [True, False])
def test_context_parallel_ranks(size: int, packed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.arange(1, 121).view(2, 60)
    bounds = BOUNDS if packed else torch.tensor([0, 60], dtype=torch.int32)
    held = [local_token_indices(bounds, size, rank) for rank in range(size)]
    sent: list[torch.Tensor] = []

    def all_gather(of_ranks: list[torch.Tensor], own: torch.Tensor, group: SimpleNamespace) -> None:
        if len(sent) < size:  # the ranks run one after the other, first to send and then to receive
            sent.append(own.clone())
        else:
            assert torch.equal(own, sent[group.rank()])
            for place, tensor in zip(of_ranks, sent, strict=True):
                place.copy_(tensor)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    for _ in range(2):
        found = [shift_left(values[:, mine], bounds if packed else None, group(size, rank)) for rank, mine in enumerate(held)]
    assert sent[0].shape[-1] == len(bounds) - 1, "two numbers for each sequence are sent"
    for mine, got in zip(held, found, strict=True):
        assert torch.equal(got, shifted(values, bounds)[:, mine])
