"""What the planner says of a published row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from benchmarks.published import memory, pretraining, rounds, transfers
from benchmarks.published.rows import MODELS, NotPredicted, Round, Set, TrainStep, Transfer
from megatron_r1.plan.decode_time import Engine, cache_tokens
from megatron_r1.plan.devices import Accelerator, device_named
from megatron_r1.plan.lengths import ResponseLengths
from megatron_r1.plan.round_time import RoundSetting, round_seconds, step_seconds_of
from megatron_r1.plan.transfer_time import transfer_seconds
from megatron_r1.plan.update_time import TrainedBatch, update_seconds
from megatron_r1.plan.work import ModelWork, model_work

_WORK = {name: model_work(arch) for name, arch in MODELS.items()}
_MOST_SEQUENCES = 1024  # of a step: vLLM's own default on large devices, which the sources leave
NOT_PREDICTED: list[NotPredicted] = [
    *pretraining.NOT_PREDICTED,
    *rounds.NOT_PREDICTED,
    *transfers.NOT_PREDICTED,
    *memory.NOT_PREDICTED,
]


@dataclass(frozen=True)
class Compared:
    """A number as published, and as predicted."""

    row: str
    what: str
    set: Set
    measured: float
    predicted: float
    source: str

    @property
    def error(self) -> float:
        """Of the prediction, as a share of what was measured; positive: predicted too much."""
        return self.predicted / self.measured - 1


def compare_times() -> list[Compared]:
    """Every row whose time the planner predicts."""
    found: list[Compared] = []
    for step in pretraining.STEPS:
        found.append(_train_step(step))
    for one in rounds.ROUNDS:
        found += _round(one)
    for way in transfers.TRANSFERS:
        found.append(_transfer(way))
    return found


def compare_memory() -> list[Compared]:
    """Every row whose memory the planner predicts, in GiB. Nothing is fitted, so all are held out."""
    return [Compared(row.name, "GiB", "held out", row.gib, memory.predicted_gib(row), row.source) for row in memory.PEAKS]


def _train_step(row: TrainStep) -> Compared:
    batch = TrainedBatch(float(row.rows * row.tokens), (row.tokens + 1) / 2, float(row.micro_rows * row.tokens))
    parts = update_seconds(_WORK[row.model], device_named(row.device), row.grid, batch, row.training)
    return Compared(row.name, "step", row.set, row.seconds, sum(parts.values()), row.source)


def setting_of(row: Round, work: ModelWork, device: Accelerator) -> RoundSetting:
    """A published round in the planner's numbers."""
    engine = Engine(
        row.engine, row.element, max_sequences=_MOST_SEQUENCES, accepted=row.accepted, drafts=row.drafts, graphs=row.graphs
    )
    engine = replace(engine, cache_tokens=cache_tokens(work, device, engine, row.cache_share))
    devices = row.sampling_devices or row.grid.devices
    return RoundSetting(
        grid=row.grid, engine=engine, engines=devices // row.engine, responses=row.responses, group=row.shared_by,
        updates=row.updates, prompt=row.prompt, lengths=ResponseLengths(row.mean, row.limit, row.spread),
        micro_batch=row.micro_batch * row.grid.cp, scoring_batch=(row.scoring_batch or row.micro_batch) * row.grid.cp,
        scored=row.scored, training=row.training, way="resharded" if row.sampling_devices else "gathered",
        ahead=row.ahead if row.sampling_devices else 0,
    )  # fmt: skip


def _round(row: Round) -> Iterator[Compared]:
    work, device = _WORK[row.model], device_named(row.device)
    phases, _ = round_seconds(work, device, setting_of(row, work, device))
    for what, seconds in row.seconds.items():
        if what == "step":
            predicted = step_seconds_of(phases, beside=bool(row.sampling_devices))
        else:
            predicted = sum(phases[what].values()) / (row.scored if what == "log-probs" else 1)  # sources state one pass
        yield Compared(row.name, what, row.set, seconds, predicted, row.source)


def _transfer(row: Transfer) -> Compared:
    parts = transfer_seconds(
        _WORK[row.model], device_named(row.device), way=row.way, trainers=row.trainers, engines=row.engines, element=row.element
    )
    return Compared(row.name, "sync", row.set, row.seconds, sum(parts.values()), row.source)
