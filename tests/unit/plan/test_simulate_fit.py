"""Rates from a run's own records: a run that the simulator itself made gives back what it was made with."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_r1.errors import DataError
from megatron_r1.plan.simulate import Mode, simulate
from megatron_r1.plan.simulate_engines import EngineSpeed
from megatron_r1.plan.simulate_fit import fit_rates, read_rounds
from megatron_r1.plan.simulate_lengths import Lognormal
from tests.simulated_runs import SETUP, write_run


def test_the_rates_of_a_simulated_run_are_found_again(tmp_path: Path) -> None:
    write_run(tmp_path / "run", SETUP, 8)
    rounds = read_rounds(tmp_path / "run")
    assert [of.step for of in rounds] == list(range(1, 9))
    recorded = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[4])
    assert rounds[3].total == pytest.approx(recorded["seconds/step"])
    rates = fit_rates([(replace(SETUP.engines, speed=EngineSpeed(((1, 9.0),)), start_seconds=0.0), rounds)])
    assert rates.speed.step_seconds(8) == pytest.approx(SETUP.engines.speed.step_seconds(8), rel=1e-6)
    assert rates.start_seconds == pytest.approx(1.5, rel=1e-6)
    for found, given in ((rates.trainer.logprob, SETUP.trainer.logprob), (rates.trainer.train, SETUP.trainer.train)):
        assert (found.fixed, found.token) == pytest.approx((given.fixed, given.token), rel=1e-6)
    assert (rates.trainer.sync, rates.trainer.rest, rates.scorers.fixed) == pytest.approx((0.75, 0.125, 0.25))


def test_rates_of_two_runs_hold_for_a_third_with_another_limit(tmp_path: Path) -> None:
    cases = []
    for most in (4, 16):
        setup = replace(SETUP, engines=replace(SETUP.engines, count=1, max_num_seqs=most))
        write_run(tmp_path / str(most), setup, 3, seed=most)
        cases.append((setup.engines, read_rounds(tmp_path / str(most))))
    rates = fit_rates(cases)
    other = replace(SETUP, engines=replace(SETUP.engines, count=1, max_num_seqs=8))
    lengths = Lognormal(60, 0.8, 300)
    fitted = replace(other, engines=replace(other.engines, speed=rates.speed, start_seconds=rates.start_seconds))
    (found,), (given,) = simulate(fitted, Mode(), lengths, 1, 5), simulate(other, Mode(), lengths, 1, 5)
    assert found.rollout == pytest.approx(given.rollout, rel=1e-6)


def test_noise_gives_no_rate_below_zero(tmp_path: Path) -> None:
    write_run(tmp_path / "run", SETUP, 6)
    rounds = read_rounds(tmp_path / "run")
    random = np.random.default_rng(0)
    noisy = [replace(of, seconds={part: s * random.uniform(0.5, 2) for part, s in of.seconds.items()}) for of in rounds]
    rates = fit_rates([(SETUP.engines, noisy)])
    assert min(rates.start_seconds, rates.trainer.train.fixed, rates.trainer.train.token, *rates.speed.step_seconds(8)) >= 0


def test_a_run_with_too_little_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", SETUP, 1)
    with pytest.raises(DataError, match="two recorded rounds at least, there are 1"):
        fit_rates([(SETUP.engines, read_rounds(tmp_path / "run"))])
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "seconds/step": 2}\n')
    with pytest.raises(DataError, match="has no step with rollouts"):
        read_rounds(tmp_path / "run")
