"""How a flat range of a tensor is cut into boxes, and that Adam's moments begin at zero."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore.optimizer_state import boxes_of_range, create_moments
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


def test_moments_are_zero_whatever_the_optimizer() -> None:
    """Megatron-Core makes those of another Adam than torch's from memory as it was."""
    weight = torch.nn.Parameter(torch.ones(3))
    adam = SimpleNamespace(state={}, param_groups=[{"params": [weight]}])

    def load_state_dict(_: object) -> None:
        adam.state[weight] = {name: torch.full((3,), float("nan")) for name in ("exp_avg", "exp_avg_sq")}

    part = SimpleNamespace(optimizer=adam, is_stub_optimizer=False, state_dict=dict, load_state_dict=load_state_dict)
    create_moments(SimpleNamespace(chained_optimizers=[part]))
    assert all(moment.eq(0).all() for moment in adam.state[weight].values()) and len(adam.state[weight]) == 2
    adam.state[weight]["exp_avg"].fill_(1)
    create_moments(SimpleNamespace(chained_optimizers=[part]))
    assert adam.state[weight]["exp_avg"].eq(1).all(), "moments that are there stay"
