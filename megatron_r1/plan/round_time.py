"""Seconds of a round of reinforcement learning, phase by phase, and what waits for what."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.plan.decode_time import ENGINE_COSTS, Engine, EngineCosts, SampledRound, sampling
from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.layer_time import COSTS, Costs, Grid
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.transfer_time import TRANSFER_COSTS, SentShards, TransferCosts, Way, shards_seconds, transfer_seconds
from megatron_r1.plan.update_time import TrainedBatch, Training, own_parameters, pass_seconds, update_seconds
from megatron_r1.plan.work import ModelWork

_BF16 = 2


@dataclass(frozen=True)
class AllCosts:
    """Of programs, not of devices."""

    layers: Costs = COSTS
    engine: EngineCosts = ENGINE_COSTS
    transfer: TransferCosts = TRANSFER_COSTS
    between: float = 5.0  #: seconds of a round outside its phases: rewards that are not hidden, logs
    sample: float = 1.05e-3  #: seconds of a pass over the samples for each of them: their data travels to the ranks and back


ALL_COSTS = AllCosts()


@dataclass(frozen=True)
class RoundSetting:
    """A round, in plain numbers."""

    grid: Grid  #: of the trainer
    engine: Engine
    engines: int
    responses: int
    group: int  #: responses to a prompt
    updates: int
    prompt: float  #: tokens, in the mean
    lengths: ResponseLengths  #: of responses
    micro_batch: float  #: most tokens of an update's forward pass
    scoring_batch: float  #: of a forward pass for log-probabilities
    scored: int  #: passes of log-probabilities: the policy's, the reference's
    training: Training
    way: Way | SentShards
    ahead: int = 0  #: rounds that engines with devices of their own may sample before the trainer; 0: they share them
    element: float = 2.0  #: bytes of a matrix element on its way to the engines
    offloaded: bool = True  #: whether the trainer's weights are on the host while engines sample on its devices


def samples_of(setting: RoundSetting) -> TrainedBatch:
    """All samples of a round as one batch."""
    mean = setting.prompt + setting.lengths.mean
    square = setting.lengths.mean_square() + 2 * setting.prompt * setting.lengths.mean + setting.prompt**2
    variation = max(square / mean**2 - 1, 0.0) ** 0.5
    return TrainedBatch(setting.responses * mean, square / mean / 2, setting.micro_batch, setting.responses, variation)


def round_seconds(
    work: ModelWork, device: Accelerator, setting: RoundSetting, costs: AllCosts = ALL_COSTS
) -> tuple[dict[str, dict[str, float]], SampledRound]:
    """Seconds by phase and part: "generation", "log-probs", "update", "sync", "between"; and how sampling went."""
    at_once = max(setting.ahead, 1)
    drawn = sampling(
        work, device, setting.engine, responses=setting.responses * at_once, engines=setting.engines, prompt=setting.prompt,
        shared_by=setting.group, lengths=setting.lengths, costs=costs.engine,
    )  # fmt: skip
    whole = samples_of(setting)
    grid, training = setting.grid, setting.training
    batch = TrainedBatch(whole.tokens, whole.pairs, setting.scoring_batch, whole.sequences, whole.variation)
    scoring = pass_seconds(work, device, grid, batch, training, backward=False, costs=costs.layers)
    share = 1 / setting.updates
    batch = TrainedBatch(whole.tokens * share, whole.pairs, setting.micro_batch, whole.sequences * share, whole.variation)
    update = update_seconds(work, device, grid, batch, training, costs.layers)
    if isinstance(setting.way, SentShards):
        transfer = shards_seconds(work, device, setting.way, costs.transfer)
    else:
        transfer = transfer_seconds(
            work, device, way=setting.way, trainers=grid.devices, engines=setting.engines * setting.engine.devices,
            element=setting.element, held=_BF16 * own_parameters(work, grid) * setting.offloaded, costs=costs.transfer,
        )  # fmt: skip
    data = {"data": setting.responses * costs.sample}
    decode = drawn.seconds - drawn.prefill - drawn.tail
    phases = {
        "generation": {"prefill": drawn.prefill / at_once, "decode": decode / at_once, "tail": drawn.tail / at_once},
        "log-probs": {part: seconds * setting.scored for part, seconds in (scoring | data).items()},
        "update": {part: seconds * setting.updates for part, seconds in update.items()} | data,
        "sync": transfer,
        "between": {"between": costs.between},
    }
    return phases, drawn


def step_seconds_of(phases: dict[str, dict[str, float]], *, beside: bool) -> float:
    """Of a whole round: one phase after another, or sampling beside the rest."""
    sums = {phase: sum(parts.values()) for phase, parts in phases.items()}
    rest = sums["log-probs"] + sums["update"]
    first = max(sums["generation"], rest) if beside else sums["generation"] + rest
    return first + sums["sync"] + sums["between"]
