from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.plan.decode_time import Engine
from megatron_r1.plan.devices import DEVICES
from megatron_r1.plan.layer_time import Grid
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.round_time import AllCosts, RoundSetting, round_seconds, samples_of, step_seconds_of
from megatron_r1.plan.update_time import Training
from megatron_r1.plan.work import model_work

DENSE, H100 = model_work(PRESETS["qwen2.5_7b"]), DEVICES["H100"]
SETTING = RoundSetting(
    grid=Grid(8, tp=2), engine=Engine(1), engines=8, responses=512, group=16, updates=4, prompt=100.0,
    lengths=ResponseLengths(400, 2048), micro_batch=4096.0, scoring_batch=8192.0, scored=2, training=Training(), way="gathered",
)  # fmt: skip


def total(phases: dict[str, dict[str, float]], phase: str) -> float:
    return sum(phases[phase].values())


def test_phases_follow_each_other_or_run_beside() -> None:
    phases, drawn = round_seconds(DENSE, H100, SETTING)
    sums = {phase: total(phases, phase) for phase in phases}
    assert list(sums) == ["generation", "log-probs", "update", "sync", "between"]
    assert step_seconds_of(phases, beside=False) == pytest.approx(sum(sums.values()))
    hidden = min(sums["generation"], sums["log-probs"] + sums["update"])
    assert step_seconds_of(phases, beside=True) == pytest.approx(sum(sums.values()) - hidden)
    assert sums["generation"] == pytest.approx(drawn.seconds)


def test_every_pass_over_the_samples_moves_their_data() -> None:
    phases, _ = round_seconds(DENSE, H100, SETTING)
    assert phases["update"]["data"] == 512 * AllCosts().sample
    once, _ = round_seconds(DENSE, H100, replace(SETTING, scored=1))
    assert total(phases, "log-probs") == pytest.approx(2 * total(once, "log-probs"))


def test_engines_that_are_rounds_ahead_have_no_tail_to_wait_for() -> None:
    one, eight = (round_seconds(DENSE, H100, replace(SETTING, ahead=ahead))[0] for ahead in (1, 8))
    assert total(eight, "generation") < total(one, "generation")


def test_samples_have_the_squares_of_their_lengths() -> None:
    batch = samples_of(replace(SETTING, lengths=ResponseLengths(400, 2048, spread=0)))
    assert batch.tokens == 512 * 500 and batch.pairs == pytest.approx(250) and batch.variation == pytest.approx(0, abs=1e-6)
    assert samples_of(SETTING).pairs > 250
