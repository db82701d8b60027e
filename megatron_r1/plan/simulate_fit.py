"""The rates of engines and trainer from what a finished run of grpo has recorded, so that it can be played again, or otherwise.

A round's sampling is taken as seconds for every step of the engine that was done last, for every token that it sampled, and once;
its log-probs and updates as seconds once and for every token. The numbers that fit the recorded rounds best, none below 0, are the
rates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.plan.simulate import Cost, Scorers, Trainer
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines, make_group, sample_round
from megatron_r1.plan.simulate_lengths import recorded_lengths
from megatron_r1.runtime.metrics import read_metrics

PARTS = ("rollout", "reward", "logprob", "train", "sync")  #: timers of metrics.jsonl that a round always has
_TURNS = 4  # of fitting, as with several engines the rates decide who samples what


@dataclass(frozen=True)
class RecordedRound:
    """One round of a run."""

    step: int
    lengths: list[np.ndarray]  #: int64, tokens of each prompt's responses
    seconds: dict[str, float]  #: of each of `PARTS`, and "rest", all others together
    idle: float  #: `rollout/idle`: part of the engines' time until the last is done in which they have nothing to do

    @property
    def total(self) -> float:
        """Seconds of the whole round."""
        return sum(self.seconds.values())

    @property
    def tokens(self) -> int:
        """Of all responses."""
        return sum(int(row.sum()) for row in self.lengths)


@dataclass(frozen=True)
class FittedRates:
    """What the rounds of a run tell of their machine."""

    speed: EngineSpeed
    start_seconds: float  #: see `PlayedEngines`
    trainer: Trainer
    scorers: Scorers


def read_rounds(run: Path) -> list[RecordedRound]:
    """The rounds of a run folder that have both metrics and rollouts.

    Raises DataError: there are none, or a file is malformed.
    """
    lengths = recorded_lengths(run)
    rounds = []
    for record in read_metrics(run / "metrics.jsonl"):
        step, known = record["step"], {part: record.get(f"seconds/{part}") for part in (*PARTS, "step")}
        seconds = {part: float(value) for part, value in known.items() if isinstance(value, int | float)}
        if step not in lengths or len(seconds) < len(known):
            continue
        whole = seconds.pop("step")
        rest = max(0.0, whole - sum(seconds.values()))
        rounds.append(RecordedRound(step, lengths[step], {**seconds, "rest": rest}, record.get("rollout/idle") or 0.0))
    if not rounds:
        raise DataError(f"{run}/metrics.jsonl has no step with rollouts and seconds of its parts: give the run folder of grpo")
    return rounds


def fit_rates(cases: Sequence[tuple[PlayedEngines, Sequence[RecordedRound]]], prompt_tokens: int = 0) -> FittedRates:
    """The rates that fit the rounds of one run, or of several on the same machine.

    Args:
        cases: engines of a run, whose speed means nothing, and its rounds.
        prompt_tokens: of every prompt.

    Raises DataError if there are fewer than two rounds.
    """
    rounds = [of_run for _, of_case in cases for of_run in of_case]
    if len(rounds) < 2:
        raise DataError(f"rates need two recorded rounds at least, there are {len(rounds)}: let the run go on")
    step, token, start = 1.0, 0.0, 0.0
    for _ in range(_TURNS):
        rows = []
        for engines, of_case in cases:
            speed = EngineSpeed(((1, step + token), (2, step + 2 * token)))
            rows += [_last_engine(replace(engines, speed=speed), of_run, prompt_tokens) for of_run in of_case]
        known = np.array([[*row, 1.0] for row in rows])
        step, token, start = _fit(known, [of_run.seconds["rollout"] for of_run in rounds])
        if not step + token:
            raise DataError("the rounds took no time for what they sampled: give a run with longer responses")
    tokens = [[1.0, of_run.tokens + prompt_tokens * sum(map(len, of_run.lengths))] for of_run in rounds]
    costs = {part: Cost(*_fit(np.array(tokens), [of_run.seconds[part] for of_run in rounds])) for part in ("logprob", "train")}
    sync, rest, reward = (float(np.median([of_run.seconds[part] for of_run in rounds])) for part in ("sync", "rest", "reward"))
    return FittedRates(
        EngineSpeed(((1, step + token), (2, step + 2 * token))),
        start,
        Trainer(costs["logprob"], costs["train"], sync, rest),
        Scorers(fixed=reward),
    )


def _last_engine(engines: PlayedEngines, recorded: RecordedRound, prompt_tokens: int) -> tuple[int, int]:
    """Steps of the engine that is done last in a round, and the tokens that it samples."""
    sampled = sample_round(engines, [make_group(prompt_tokens, row.tolist()) for row in recorded.lengths])
    last = max(range(engines.count), key=sampled.busy.__getitem__)
    return sampled.steps[last], sampled.sampled[last]


def _fit(known: np.ndarray, seconds: Sequence[float]) -> list[float]:
    """Numbers of at least 0 by which the columns of `known` [rounds, columns] are added up to the seconds, by relative error."""
    measured = np.maximum(np.array(seconds), 1e-9)
    scaled = known / measured[:, None]
    best, smallest = np.zeros(known.shape[1]), np.inf
    for size in range(1, known.shape[1] + 1):
        for columns in map(list, combinations(range(known.shape[1]), size)):
            found, *_ = np.linalg.lstsq(scaled[:, columns], np.ones(len(measured)), rcond=None)
            error = float(((scaled[:, columns] @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < smallest * (1 - 1e-9):
                best, smallest = np.zeros(known.shape[1]), error
                best[columns] = found
    return best.tolist()
