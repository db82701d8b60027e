"""The plan of a pretraining run: of every update its phase, rows, learning rate, router bias speed and weight of MTP.

It is a pure function of the settings and of how many tokens were consumed, so nothing of it is saved: a run that goes on, also with
other ranks, makes the same updates. DeepSeek-V3 (arXiv 2412.19437) sections 4.2 and 4.3 are the case it must hold.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.pretrain import LearningRatePart, PretrainConfig, PretrainPhase, ValuePart
from megatron_r1.config.rates import Rates, learning_rate, shape_left
from megatron_r1.errors import ConfigError


@dataclass(frozen=True)
class Level:
    """Consecutive updates with the same number of rows."""

    first_update: int  #: of the run, from 1
    first_row: int  #: of the phase, from 0
    rows: int  #: of each update


@dataclass(frozen=True)
class Phase:
    """A part of the run with one length of sequences and one RoPE."""

    number: int  #: from 0
    key: str  #: the setting that makes it, for messages
    first_update: int  #: of the run, from 1
    updates: int
    first_token: int  #: tokens that the phases before it consume
    tokens: int
    sequence_length: int
    micro_batch_size: int
    levels: tuple[Level, ...]
    settings: PretrainPhase

    @property
    def last_update(self) -> int:
        """Of the run."""
        return self.first_update + self.updates - 1

    @property
    def rope_scaling(self) -> dict[str, Any] | None | str:
        """That of config.json; None: unscaled; "model": as the model has it."""
        given = self.settings.rope_scaling
        return "model" if given is None else None if given == "none" else given


@dataclass(frozen=True)
class Update:
    """What one update trains on, and with which rates."""

    number: int  #: in the run, from 1
    phase: Phase
    rows: range  #: their numbers in the phase
    first_token: int  #: tokens that the run consumed before it
    rates: Rates

    @property
    def tokens(self) -> int:
        """It trains on."""
        return len(self.rows) * self.phase.sequence_length


class PretrainPlan:
    """All updates of a run.

    Attributes:
        phases: at least one. With `pretrain.phases` empty it is one of `pretrain.steps` updates.

    Raises:
        ConfigError: the phases contradict themselves; one line that names the setting.
    """

    def __init__(self, stage: PretrainConfig) -> None:
        self._stage = stage
        phases: list[Phase] = []
        for number, settings in enumerate(stage.phases or [PretrainPhase(updates=stage.steps)]):
            phases.append(_make_phase(stage, number, settings, phases[-1] if phases else None))
        self.phases = tuple(phases)
        _check_mtp(stage)
        self._schedule = learning_rate(stage.optimizer, self.total_updates)
        self._starts = _starting_rates(stage)

    @property
    def moe(self) -> MoeTrainingConfig:
        """What the model is built for: if some update moves the router's biases, it counts their tokens in all."""
        parts = [part.value for phase in self._stage.phases for part in phase.bias_update_rate]
        moe = self._stage.moe
        return moe.model_copy(update={"bias_update_rate": max([moe.bias_update_rate, *parts])})

    @property
    def total_updates(self) -> int:
        """Of all phases."""
        return self.phases[-1].last_update

    @property
    def total_tokens(self) -> int:
        """Of all phases."""
        return self.phases[-1].first_token + self.phases[-1].tokens

    def phase_of(self, number: int) -> Phase:
        """The phase of an update of the run, by its number from 1; updates after the last phase belong to it."""
        return self.phases[bisect_right([phase.first_update for phase in self.phases], number) - 1]

    def update(self, number: int) -> Update:
        """An update of the run, by its number from 1. After the last phase its last batch goes on."""
        phase = self.phase_of(number)
        level = phase.levels[bisect_right([level.first_update for level in phase.levels], number) - 1]
        first_row = level.first_row + (number - level.first_update) * level.rows
        within = first_row * phase.sequence_length
        rates = self._rates(number, phase, within)
        return Update(number, phase, range(first_row, first_row + level.rows), phase.first_token + within, rates)

    def after(self, tokens: int) -> Update:
        """The update that consumes the token after so many tokens of the run."""
        phase = self.phases[bisect_right([phase.first_token for phase in self.phases], tokens) - 1]
        row = (tokens - phase.first_token) // phase.sequence_length
        level = phase.levels[bisect_right([level.first_row for level in phase.levels], row) - 1]
        return self.update(level.first_update + (row - level.first_row) // level.rows)

    def _rates(self, number: int, phase: Phase, consumed: int) -> Rates:
        """Of an update that begins after so many tokens of its phase."""
        settings, optimizer, moe = phase.settings, self._stage.optimizer, self._stage.moe
        if settings.learning_rate:
            warm = min(1.0, number / optimizer.warmup_steps) if optimizer.warmup_steps else 1.0
            lr = warm * _falling(settings.learning_rate, self._starts[phase.number], consumed)
        else:
            lr = self._schedule(number)
        bias = _held(settings.bias_update_rate, consumed, moe.bias_update_rate)
        return Rates(lr, bias, _held(settings.mtp_loss_scale, consumed, moe.mtp_loss_scale))


def _make_phase(stage: PretrainConfig, number: int, settings: PretrainPhase, before: Phase | None) -> Phase:
    key = f"pretrain.phases.{number}" if stage.phases else "pretrain"
    if (settings.tokens is None) == (settings.updates is None):
        raise ConfigError(f"{key}: give either its tokens or its updates")
    for name in ("learning_rate", "bias_update_rate", "mtp_loss_scale"):
        parts = getattr(settings, name)
        endless = [place for place, part in enumerate(parts[:-1]) if part.tokens is None]
        if endless:
            raise ConfigError(f"{key}.{name}.{endless[0]}.tokens is not set: only the last part lasts for the rest of the phase")
    last = settings.learning_rate[-1] if settings.learning_rate else None
    if last is not None and last.shape != "constant" and last.tokens is None:
        raise ConfigError(f"{key}.learning_rate: its last part is {last.shape}, so it needs tokens to say how long it falls")
    length = settings.sequence_length or stage.sequence_length
    full = settings.global_batch_size or stage.global_batch_size
    first_update = before.last_update + 1 if before else 1
    levels, updates, rows = _levels(key, settings, full, length, first_update)
    return Phase(
        number=number,
        key=key,
        first_update=first_update,
        updates=updates,
        first_token=before.first_token + before.tokens if before else 0,
        tokens=rows * length,
        sequence_length=length,
        micro_batch_size=_micro_batch_size(stage, key, length, [level.rows for level in levels]),
        levels=levels,
        settings=settings,
    )


def _levels(key: str, settings: PretrainPhase, full: int, length: int, first_update: int) -> tuple[tuple[Level, ...], int, int]:
    """Levels of the batch in a phase, its updates and its rows.

    As Megatron-LM's ramp, but in tokens: of n increments, level j begins when j / n of the ramp's tokens are consumed.
    """
    ramp, stretches = settings.batch_ramp, 0
    if ramp is not None:
        stretches, rest = divmod(full - ramp.start, ramp.increment)
        if rest or stretches < 1:
            raise ConfigError(f"{key}.batch_ramp: steps of {ramp.increment} do not lead from {ramp.start} to {full} sequences")
    levels, rows, updates = [], 0, 0
    for stretch in range(stretches + 1):
        size = full - (stretches - stretch) * (ramp.increment if ramp else 0)
        count = None
        if ramp is not None and stretch < stretches:
            count = max(0, -((rows * length * stretches - (stretch + 1) * ramp.tokens) // (stretches * size * length)))
        left = None if settings.updates is None else settings.updates - updates
        if settings.tokens is not None:
            left = max(0, -((rows * length - settings.tokens) // (size * length)))
        assert left is not None
        count = left if count is None else min(count, left)
        if count:
            levels.append(Level(first_update + updates, rows, size))
        rows, updates = rows + count * size, updates + count
    return tuple(levels), updates, rows


def _micro_batch_size(stage: PretrainConfig, key: str, length: int, batches: Sequence[int]) -> int:
    given = stage.micro_batch_size
    if length == stage.sequence_length:
        wrong = [rows for rows in batches if rows % given]
        if wrong and len(batches) > 1:
            raise ConfigError(f"{key}.batch_ramp: pretrain.micro_batch_size={given} does not divide its {wrong[0]} sequences")
        if wrong:
            name = key if stage.phases and stage.phases[int(key.rpartition(".")[2])].global_batch_size else "pretrain"
            raise ConfigError(f"pretrain.micro_batch_size does not divide {name}.global_batch_size")
        return given
    most = max(1, given * stage.sequence_length // length)
    return next(size for size in range(most, 0, -1) if not any(rows % size for rows in batches))


def _check_mtp(stage: PretrainConfig) -> None:
    """A head that is not trained is built frozen, so it cannot begin or end to be trained within a run."""
    trained = {bool(stage.moe.mtp_loss_scale)}
    for number, phase in enumerate(stage.phases):
        trained |= {bool(part.value) for part in phase.mtp_loss_scale}
        if len(trained) > 1:
            raise ConfigError(
                f"pretrain.phases.{number}.mtp_loss_scale: all values and pretrain.moe.mtp_loss_scale are 0, or none is: a head "
                "is trained in the whole run or never"
            )


def _starting_rates(stage: PretrainConfig) -> list[float]:
    """The learning rate that each phase's own parts begin from: what the phase before ends with, if it has parts, too."""
    starts = [stage.optimizer.lr]
    for phase in stage.phases:
        starts.append(phase.learning_rate[-1].lr if phase.learning_rate else stage.optimizer.lr)
    return starts


def _falling(parts: Sequence[LearningRatePart], before: float, consumed: int) -> float:
    start = 0
    for place, part in enumerate(parts):
        is_last = place == len(parts) - 1
        if is_last or (part.tokens is not None and consumed < start + part.tokens):
            if part.shape == "constant":
                return part.lr
            assert part.tokens is not None, "`_make_phase` looks"
            return part.lr + shape_left(part.shape, min(1.0, (consumed - start) / part.tokens)) * (before - part.lr)
        start, before = start + (part.tokens or 0), part.lr
    raise AssertionError("a phase's own learning rate has parts")


def _held(parts: Sequence[ValuePart], consumed: int, otherwise: float) -> float:
    end = 0
    for part in parts:
        end += part.tokens or 0
        if part.tokens is None or consumed < end:
            return part.value
    return parts[-1].value if parts else otherwise
