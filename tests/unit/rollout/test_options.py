"""Time limits of engines: the start grows with what starts, sampling has none but that for silence, and settings win."""

from __future__ import annotations

import pytest

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.options import EngineOptions, engine_options, start_limit


def options(preset: str, **settings: object) -> EngineOptions:
    rollout = RolloutConfig(max_response_tokens=8, **settings)
    limits = {"bos_token_id": 0, "eos_token_id": 1, "max_prompt_tokens": 8}
    return engine_options(PRESETS[preset], rollout, device="cuda", dtype="bfloat16", **limits)


def test_the_start_may_take_longer_with_more_workers_nodes_and_weights():
    assert options("tiny").start_timeout_seconds == pytest.approx(600, abs=0.1)
    spread = options("671b", placement="colocated", tensor_parallel_size=64, nodes_per_engine=8)
    assert spread.start_timeout_seconds == pytest.approx(600 + 5 * 63 + 30 * 7 + 10 * 1342.05 / 64, abs=0.1)
    assert options("671b", tensor_parallel_size=64, start_timeout_seconds=77.0).start_timeout_seconds == 77.0
    assert start_limit(None) == 600.0, "announcements of servers"
    grows = [start_limit(None, workers, nodes, size) for workers, nodes, size in ((1, 1, 0), (8, 1, 0), (8, 2, 0), (8, 2, 10**12))]
    assert grows == sorted(set(grows))


def test_a_call_has_no_total_limit_unless_one_is_set():
    assert options("tiny").step_timeout_seconds is None
    assert options("tiny", step_timeout_seconds=3600.0).step_timeout_seconds == 3600.0
