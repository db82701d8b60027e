"""How a flat range of a tensor is cut into boxes, and how many bytes an optimizer has."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore.optimizer_state import boxes_of_range
from megatron_r1.mcore.state_bytes import StateBytes, optimizer_bytes


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 4), (1, 5), (2, 3, 4), (2, 1, 3, 2)])
def test_boxes_hold_every_element_of_a_range_in_order(shape: tuple[int, ...]) -> None:
    numbered = torch.arange(max(1, torch.Size(shape).numel())).view(shape)
    for start in range(numbered.numel() + 1):
        for stop in range(start, numbered.numel() + 1):
            boxes = list(boxes_of_range(shape, start, stop))
            cut = [numbered[tuple(slice(o, o + s) for o, s in zip(*box, strict=True))].flatten() for box in boxes]
            assert torch.cat([torch.empty(0, dtype=torch.long), *cut]).tolist() == list(range(start, stop))
            assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_a_stage_of_671b_has_the_bytes_that_its_presets_state() -> None:
    """Four layers of 671b with tp 8, ep 32 and 4 data-parallel ranks, one of which has the experts."""
    held = StateBytes.of(176_000_000, 1_409_300_000, data_parallel=4, bf16=True, has_reference=True)
    in_gb = [round(held.moved([name]) / 1e9, 1) for name in ("weights", "gradients", "optimizer", "reference")]
    assert in_gb == [3.2, 6.3, 17.4, 3.2]
    assert round(held.moved(["gradients", "optimizer"]) / 1e9) == 24
    assert optimizer_bytes(176_000_000, data_parallel=4) + optimizer_bytes(1_409_300_000) == held.optimizer
    low = StateBytes.of(176_000_000, 1_409_300_000, data_parallel=4, bf16=True, moments=(2, 2))
    assert (round(low.optimizer / 1e9, 1), round(low.update / 1e9, 1), low.host) == (11.6, 11.6, 0)
    away = StateBytes.of(176_000_000, 1_409_300_000, data_parallel=4, bf16=True, on_host=1.0)
    assert (away.optimizer, away.update, round(away.host / 1e9, 1)) == (0, 0, 23.3)
