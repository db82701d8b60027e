"""Rounds in closed form: who waits for whom, and how old samples are."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.plan.simulate import Cost, Mode, Scorers, Setup, Trainer, simulate
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines
from megatron_r1.plan.simulate_lengths import Equal, Lognormal, Replayed

STEP = 0.5
ENGINES = PlayedEngines(4, 64, EngineSpeed(((1, STEP),)), dispatch="fixed")
TRAINER = Trainer(Cost(2.0, 0.001), Cost(4.0, 0.002), sync=3.0, rest=1.0)
SETUP = Setup(8, 4, ENGINES, TRAINER, prompt_tokens=5)
TOKENS = 8 * 4 * 105
LOGPROB, TRAIN = 2.0 + 0.001 * TOKENS, 4.0 + 0.002 * TOKENS
ROLLOUT = 100 * STEP


def test_a_synchronous_round_of_equal_answers() -> None:
    rounds = simulate(SETUP, Mode(), Equal(100), 3)
    whole = ROLLOUT + LOGPROB + TRAIN + 3.0 + 1.0
    for of in rounds:
        assert of.seconds == pytest.approx(whole)
        assert (of.rollout, of.logprob, of.train, of.sync) == pytest.approx((ROLLOUT, LOGPROB, TRAIN, 3.0))
        assert of.tail == 0 and of.engines_in_tail == 0 and (of.staleness_mean, of.staleness_max) == (0, 0)
        assert of.engines_sampling == pytest.approx(ROLLOUT / whole)
        assert of.engines_idle == pytest.approx((LOGPROB + TRAIN + 1.0) / whole)
        assert of.trainer_idle == pytest.approx(ROLLOUT / whole)
        assert of.devices_idle == pytest.approx(0, abs=1e-9)
        assert of.occupancy == pytest.approx(8 / 64) and of.tokens == 3200


def test_one_long_answer_in_a_synchronous_round() -> None:
    rows = np.full((8, 4), 100)
    rows[3, 1] = 900
    (of,) = simulate(SETUP, Mode(), Replayed([list(rows)]), 1)
    assert of.rollout == pytest.approx(900 * STEP) and of.tail == pytest.approx(800 * STEP)
    assert of.engines_in_tail == pytest.approx(3 * 800 * STEP / (4 * of.seconds))
    assert of.devices_idle == pytest.approx(of.engines_in_tail)  # all else is somebody's turn


@pytest.mark.parametrize(("length", "longer"), ((100, "rollout"), (10, "trainer")))
def test_one_step_off_takes_the_longer_of_sampling_and_training(length: int, longer: str) -> None:
    rounds = simulate(SETUP, Mode(steps_off=1), Equal(length), 5)
    tokens = 8 * 4 * (length + 5)
    trainer = 6.0 + 0.003 * tokens + 1.0
    assert (length * STEP > trainer) == (longer == "rollout")
    for of in rounds[1:]:
        assert of.seconds == pytest.approx(3.0 + max(length * STEP, trainer))
        assert (of.staleness_mean, of.staleness_max) == (1, 1)
        idle = abs(length * STEP - trainer) / of.seconds
        assert of.engines_idle == pytest.approx(0 if longer == "rollout" else idle, abs=1e-9)
        assert of.trainer_idle == pytest.approx(idle if longer == "rollout" else 0, abs=1e-9)
    assert rounds[0].staleness_max == 0  # sampled by the weights that it trains


def test_scoring_that_is_slower_than_sampling_is_waited_for() -> None:
    setup = Setup(8, 4, ENGINES, TRAINER, Scorers(workers=2, seconds=0.75, fixed=0.5))
    (of,) = simulate(setup, Mode(), Equal(100), 1)
    assert of.waited_for_scores == pytest.approx(32 * 0.75 / 2 + 0.5)
    (one_off, *_) = simulate(setup, Mode(steps_off=1), Equal(100), 2)
    assert one_off.waited_for_scores == pytest.approx(of.waited_for_scores)


def test_partial_rollouts_cut_the_tail_and_make_samples_older() -> None:
    lengths = Lognormal(400, 1.0, 4000)
    whole, partial = (simulate(SETUP, Mode(0, factor), lengths, 40, seed=3) for factor in (1.0, 2.0))
    tail_of = [np.mean([of.tail for of in rounds[1:]]) for rounds in (whole, partial)]
    assert tail_of[1] < 0.5 * tail_of[0]
    assert np.mean([of.engines_in_tail for of in partial[1:]]) < 0.3 * np.mean([of.engines_in_tail for of in whole[1:]])
    assert all(of.staleness_max == 0 for of in whole) and max(of.staleness_max for of in partial) >= 1
    assert all(0 <= of.staleness_mean <= of.staleness_max for of in partial)


def test_a_group_that_is_carried_on_has_tokens_of_both_weights() -> None:
    rows = [np.array(row) for row in ([10, 10], [10, 40], [10, 10], [10, 10], [10, 10])]
    setup = Setup(2, 2, PlayedEngines(1, 6, EngineSpeed(((1, 1.0),))), Trainer(Cost(), Cost()))
    first, second = simulate(setup, Mode(0, 1.5), Replayed([rows]), 2)
    assert (first.rollout, first.staleness_max) == (10, 0)
    # The round needs two groups: one of the two new ones, and after as many steps the other; the carried one goes on.
    assert second.rollout == 10 and second.staleness_max == 0
    third = simulate(setup, Mode(0, 1.5), Replayed([[*rows[:3], np.array([50, 50]), np.array([60, 60])]]), 2)[1]
    assert third.rollout == 50 and third.staleness_max == 1  # 30 more tokens end the carried one, 50 a new one
    assert third.staleness_mean == pytest.approx((10 + 10) / (10 + 40 + 50 + 50))


def test_the_same_seed_gives_the_same_rounds() -> None:
    lengths = Lognormal(300, 1.0, 2000, 0.5)
    first, again, other = (simulate(SETUP, Mode(1, 1.25), lengths, 4, seed) for seed in (7, 7, 8))
    assert first == again != other


def test_one_step_off_beside_the_trainer_is_refused() -> None:
    with pytest.raises(ConfigError, match="devices of their own"):
        simulate(Setup(8, 4, ENGINES, TRAINER, colocated=True), Mode(1), Equal(10), 1)
    assert Mode(1, 1.25).name == "one step off, partial 1.25"
