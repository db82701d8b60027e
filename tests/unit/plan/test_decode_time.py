from __future__ import annotations

import math
from dataclasses import replace

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.decode_time import (
    Engine,
    EngineCosts,
    SampledRound,
    cache_bytes_of_token,
    cache_tokens,
    sampling,
    step_seconds,
)
from megatron_r1.plan.devices import DEVICES
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.work import model_work

V3, DENSE = model_work(PRESETS["671b"]), model_work(PRESETS["qwen2.5_7b"])
H100 = DEVICES["H100"]
COSTS = EngineCosts()


def sample(engine: Engine, responses: int = 256, engines: int = 1, mean: float = 400, spread: float = 0.7) -> SampledRound:
    lengths = ResponseLengths(mean, 4096, spread)
    return sampling(DENSE, H100, engine, responses=responses, engines=engines, prompt=100, shared_by=16, lengths=lengths)


def test_one_sequence_waits_for_the_weights() -> None:
    found = step_seconds(DENSE, H100, Engine(1), 1, 1000, COSTS)
    weights = (DENSE.parameters - DENSE.head) * 2 / (3350e9 * 0.8)
    cache = 1000 * 28 * 1024 * 2 / (3350e9 * 0.8)
    assert found == pytest.approx(weights + cache + 28 * COSTS.layer + COSTS.step + COSTS.sequence)


def test_few_tokens_meet_few_experts() -> None:
    one, many = (step_seconds(V3, H100, Engine(32), sequences, 1, COSTS) for sequences in (1, 256))
    assert one < many / 2


def test_sums_between_nodes_take_longer() -> None:
    eight, sixteen = (step_seconds(DENSE, H100, Engine(size), 1, 1, COSTS) for size in (8, 16))
    assert sixteen > eight


def test_an_engine_without_graphs_waits_for_its_host() -> None:
    assert step_seconds(DENSE, H100, Engine(8, graphs=False), 1, 1, COSTS) == pytest.approx(
        28 * COSTS.launch + COSTS.step + COSTS.sequence
    )


def test_what_the_cache_holds() -> None:
    assert cache_bytes_of_token(DENSE, 8) == 28 * 1024 * 2 / 4  # four key heads: eight devices keep each twice
    assert cache_bytes_of_token(V3, 32) == 61 * 576 * 2  # all of it on each
    tokens = cache_tokens(DENSE, H100, Engine(1), 0.6)
    assert tokens == pytest.approx((H100.memory_bytes * 0.6 - 4e9 - DENSE.parameters * 2) / (28 * 1024 * 2))
    with pytest.raises(ConfigError, match="168 GB of weights on each of an engine's 8 devices leave no cache"):
        cache_tokens(V3, H100, Engine(8), 0.9)


def test_attention_of_groups_has_room_for_more_sequences() -> None:
    whole, groups = Engine(64), Engine(64, attention=8)
    assert (whole.groups, groups.groups) == (1, 8)
    assert whole.weights(V3, 256) == pytest.approx(V3.parameters / 64)
    assert groups.weights(V3, 256) == pytest.approx((V3.parameters - V3.unrouted) / 64 + V3.unrouted / 8)
    rooms = [cache_tokens(V3, H100, engine, 0.6) for engine in (whole, groups)]
    assert 6.5 < rooms[1] / rooms[0] < 8, "each group has a cache of its own, beside more weights"
    assert step_seconds(V3, H100, groups, 2048, 8192, COSTS) < step_seconds(V3, H100, whole, 2048, 8192, COSTS) / 2


def test_a_round_lasts_as_long_as_its_longest_response() -> None:
    found = sample(Engine(1), responses=64)
    longest = ResponseLengths(400, 4096).quantiles(64)[-1]
    assert found.seconds > longest * (step_seconds(DENSE, H100, Engine(1), 1, 100, COSTS) * 0.99)
    assert 0 < found.tail < found.seconds and found.sequences < found.fullest == 64


def test_all_alike_have_no_tail() -> None:
    assert sample(Engine(1), spread=0).tail == 0


def test_a_small_cache_makes_waves_and_reads_again() -> None:
    free, tight = sample(Engine(1)), sample(Engine(1, cache_tokens=20_000))
    assert tight.fullest < free.fullest and tight.seconds > 1.3 * free.seconds and tight.prefill > free.prefill


def test_a_cache_for_less_than_one_sequence_still_ends() -> None:
    assert math.isfinite(sample(Engine(1, cache_tokens=50), responses=4).seconds)


def test_at_most_so_many_at_once() -> None:
    assert sample(Engine(1, max_sequences=32)).fullest == 32


def test_more_engines_and_accepted_drafts_are_faster() -> None:
    alone = sample(Engine(1), responses=1024)
    assert sample(Engine(1), responses=1024, engines=4).seconds < alone.seconds
    assert sample(replace(Engine(1), accepted=1.8, drafts=1), responses=1024).seconds < alone.seconds
