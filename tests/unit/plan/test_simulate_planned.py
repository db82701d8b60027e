"""Rates of a job by the planner: a step takes what the plan says, and a synchronous round what its time line does."""

from __future__ import annotations

import pytest

from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.plan.decode_time import ENGINE_COSTS, step_seconds
from megatron_r1.plan.job import Job, read_job
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.simulate import Mode, Setup, simulate
from megatron_r1.plan.simulate_lengths import Replayed
from megatron_r1.plan.simulate_planned import planned_rates
from megatron_r1.plan.stage_time import Assumed, plan_time, planned_engines
from megatron_r1.plan.work import model_work
from tests.paths import ROOT

CONFIG = ROOT / "examples/v3_671b/r1_zero.yaml"
ASSUMED = Assumed(response=6000, prompt=200)


@pytest.fixture(scope="module")
def job() -> Job:
    return read_job(load_config(CONFIG, ["grpo.prompts_per_rollout=64", "grpo.minibatch_size=64"]), "grpo", "H800", 64)


def test_a_step_takes_what_the_plan_says(job: Job) -> None:
    assert job.device is not None
    rates, work = planned_rates(job, ASSUMED), model_work(job.arch)
    engine, count, _ = planned_engines(job, job.device, work, ASSUMED)
    speed = rates.engines.speed
    table = speed.step_seconds(rates.engines.max_num_seqs)
    for sequences in (1, 2, 16, 64, 128):
        asked = step_seconds(work, job.device, engine, sequences, 7000, ENGINE_COSTS)
        assert table[sequences] + sequences * 7000 * speed.context_seconds == pytest.approx(asked, rel=1e-6)
    between = step_seconds(work, job.device, engine, 48, 7000, ENGINE_COSTS)
    assert table[48] + 48 * 7000 * speed.context_seconds == pytest.approx(between, rel=0.05)
    assert (rates.engines.count, rates.devices) == (count, 512)


def test_a_synchronous_round_takes_what_its_time_line_does(job: Job) -> None:
    plan, rates, stage = plan_time(job, ASSUMED), planned_rates(job, ASSUMED), job.config.grpo
    assert plan is not None
    lengths = ResponseLengths(6000, 32768, ASSUMED.spread).quantiles(1024).round().astype(int)
    rows = lengths.reshape(stage.group_size, stage.prompts_per_rollout).T  # every prompt has long and short ones
    setup = Setup(stage.prompts_per_rollout, stage.group_size, rates.engines, rates.trainer, prompt_tokens=200)
    (played,) = simulate(setup, Mode(), Replayed([list(rows)]), 1)
    phases = {phase.name: phase.seconds for phase in plan.phases}
    assert played.logprob == pytest.approx(phases["log-probs"], rel=0.02)
    assert played.train == pytest.approx(phases["update"], rel=0.02)
    assert played.rollout == pytest.approx(phases["sampling"], rel=0.15)
    assert played.seconds == pytest.approx(plan.seconds, rel=0.15)


def test_only_grpo_on_gpus_has_rounds(job: Job) -> None:
    with pytest.raises(ConfigError, match="give --gpu"):
        planned_rates(read_job(job.config, "pretrain", "H800", 64), ASSUMED)


def test_the_command_takes_rates_from_a_plan(capsys) -> None:
    common = ["plan", "simulate", "--config", str(CONFIG), "grpo.prompts_per_rollout=32", "--rounds", "1"]
    planned = [*common, "--gpu", "H800", "--nodes", "64", "--lengths", "lognormal:6000,0.7"]
    assert main(planned) == 0
    out = capsys.readouterr().out
    assert "32 prompts x 16 responses" in out and "devices idle" in out and "One step off is left out" in out
    assert main([*planned, "--like", "runs/x"]) == 2
    assert "--like or --gpu" in capsys.readouterr().err
