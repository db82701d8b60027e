"""The rates of engines and trainer for a simulation, from the planner's times: of a job that nobody has run yet."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.errors import ConfigError
from megatron_r1.plan.decode_time import ENGINE_COSTS, prefill_seconds, step_seconds
from megatron_r1.plan.job import Job
from megatron_r1.plan.simulate import Cost, Trainer
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines
from megatron_r1.plan.stage_time import Assumed, plan_time, planned_engines
from megatron_r1.plan.work import model_work

_FAR = 1e6  #: tokens of context, to tell what one of them costs


@dataclass(frozen=True)
class PlannedRates:
    """What a job's machines do, by the plan."""

    engines: PlayedEngines
    trainer: Trainer
    devices: int  #: of the job, engines' own included


def planned_rates(job: Job, assumed: Assumed) -> PlannedRates:
    """Rates of a job of grpo.

    Raises:
        ConfigError: it is none, there is no GPU to plan for, or the stage's engines do not fit.
    """
    device = job.device
    if job.stage != "grpo" or device is None:
        raise ConfigError("rounds are simulated of grpo on GPUs: give --gpu NAME")
    time = plan_time(job, assumed)
    assert time is not None, "of grpo"
    work, rollout = model_work(job.arch), job.config.rollout
    engine, count, _ = planned_engines(job, device, work, assumed)

    def step(sequences: int, context: float = 0.0) -> float:
        return step_seconds(work, device, engine, sequences, context, ENGINE_COSTS)

    # Weights are read once a step, or their products take longer: the rest is a straight line between powers of two.
    sizes = sorted({rollout.max_num_seqs, *(1 << power for power in range(rollout.max_num_seqs.bit_length()))})
    speed = EngineSpeed(
        tuple((sequences, step(sequences)) for sequences in sizes),
        context_seconds=(step(1, _FAR) - step(1)) / _FAR,
        prefill_seconds=prefill_seconds(work, device, engine, 1.0),
    )
    seconds = {phase.name: phase.seconds for phase in time.phases}
    scoring = seconds.get("log-probs", 0.0) + seconds.get("reward", 0.0)
    return PlannedRates(
        PlayedEngines(count, rollout.max_num_seqs, speed, int(engine.cache_tokens), rollout.dispatch),
        Trainer(
            Cost(token=scoring / time.tokens),
            Cost(token=seconds["update"] / time.tokens),
            sync=seconds["weight sync"],
            rest=seconds["between rounds"],
        ),
        time.devices,
    )
