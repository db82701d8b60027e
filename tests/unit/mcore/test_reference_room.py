"""Where the reference's weights stand beside the policy's, and how much memory that takes."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.reference_room import ReferenceRoom, goes_beside
from megatron_r1.mcore.state_bytes import StateBytes
from megatron_r1.mcore.switches import Switches


@pytest.mark.parametrize(
    ("layout", "switches", "reason"),
    [
        ({}, {}, None),
        ({"tp": 2, "dp": 4, "ep": 4}, {"ddp": {"overlap_grad_reduce": True, "overlap_param_gather": False}}, None),
        ({}, {"transformer": {"cuda_graph_impl": "none", "overlap_moe_expert_parallel_comm": False}}, None),
        ({"pp": 2}, {}, "a pipeline sends"),
        ({}, {"transformer": {"fp8": "e4m3"}}, r"megatron\.fp8 "),
        ({}, {"transformer": {"cuda_graph_impl": "local"}}, r"megatron\.cuda_graph_impl "),
        ({}, {"transformer": {"overlap_moe_expert_parallel_comm": True}}, r"megatron\.overlap_moe_expert_parallel_comm "),
        ({}, {"ddp": {"overlap_param_gather": True}}, r"megatron\.overlap_param_gather "),
    ],
)
def test_where_both_models_go_through_micro_batches_in_turn(layout: Any, switches: Any, reason: str | None) -> None:
    where = (Layout(**layout), Switches(**switches))
    assert goes_beside("auto", *where) is (reason is None)
    assert goes_beside("never", *where) is False
    if reason is None:
        assert goes_beside("always", *where)
    else:
        with pytest.raises(ConfigError, match=f"^grpo.reference_resident=always: .*{reason}.*; set it to auto or never$"):
            goes_beside("always", *where)


def test_room_is_what_the_update_leaves() -> None:
    """A rank with 9 GB of bf16 weights: on a device of 141 GB they fit a second time, on one of 64 GB they do not."""
    state = StateBytes.of(
        dense=1_500_000_000, experts=3_000_000_000, data_parallel=8, expert_data_parallel=2, bf16=True, has_reference=True
    )
    absent = state.gradients + state.optimizer
    spare = [
        ReferenceRoom(device - state.weights, absent=absent, activations=20 << 30, reference=state.reference).spare
        for device in (141 * 10**9, 64 * 10**9)
    ]
    assert spare[0] == 141 * 10**9 - state.weights - absent - (20 << 30) - state.reference > 0 > spare[1]
    assert ReferenceRoom(free=5, absent=2, activations=2, reference=1).spare == 0, "just enough"
