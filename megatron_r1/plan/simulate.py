"""GRPO rounds as discrete events: who waits for whom, how old samples are, and how long the tail of the longest responses is.

Three ways of running a round, and their combinations, on the same lengths:

- synchronous: sample, score, log-probs, updates, weights to the engines, and again. This project's own loop.
- one step off: engines sample the next round while the trainer works on this one, with weights that are one round old.
- partial rollouts: more prompts than a round needs are sampled; it ends when enough are complete, and what is unfinished goes on in
  the next round with newer weights, its cache computed again.

Only the synchronous round is implemented by `training.grpo`; the others are what a change of the design would bring.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from megatron_r1.errors import ConfigError
from megatron_r1.plan.simulate_engines import PlayedEngines, PlayedGroup, Sampled, make_group, sample_round
from megatron_r1.plan.simulate_lengths import LengthSource

TAIL = 0.9  #: part of a round's responses after which its tail begins
Span = tuple[float, float]  #: seconds: from, to


@dataclass(frozen=True)
class Cost:
    """Seconds of a part of a round: what it takes in any case, and for every token of its samples, prompts included."""

    fixed: float = 0.0
    token: float = 0.0

    def of(self, tokens: int) -> float:
        """Seconds of so many tokens."""
        return self.fixed + self.token * tokens


@dataclass(frozen=True)
class Trainer:
    """All training ranks together."""

    logprob: Cost
    train: Cost
    sync: float = 0.0  #: seconds of a transfer of weights, in which engines and trainer can do nothing else
    rest: float = 0.0  #: seconds of records, checkpoints and evaluations of a round


@dataclass(frozen=True)
class Scorers:
    """What scores complete groups, from the moment they are."""

    workers: int = 1
    seconds: float = 0.0  #: of one response
    fixed: float = 0.0  #: after the last one


@dataclass(frozen=True)
class Mode:
    """How rounds follow each other."""

    steps_off: Literal[0, 1] = 0  #: rounds by which the sampling weights are older than in a synchronous round
    oversampling: float = 1.0  #: prompts in flight over those of a round; above 1: partial rollouts

    @property
    def name(self) -> str:
        """For a table."""
        name = "one step off" if self.steps_off else "synchronous"
        return name if self.oversampling == 1 else f"{name}, partial {self.oversampling:g}"


@dataclass(frozen=True)
class Setup:
    """What is simulated."""

    prompts: int  #: of a round
    group_size: int
    engines: PlayedEngines
    trainer: Trainer
    scorers: Scorers = Scorers()
    prompt_tokens: int = 0  #: of every prompt
    colocated: bool = False  #: engines and trainer are on the same devices, and so never work at the same time


@dataclass
class Round:
    """One round, from the end of the one before. Times in seconds; shares of the round's whole time, mean over engines."""

    number: int
    begin: float
    end: float
    rollout: float  #: of the round's own sampling, which one step off lies in the time of the round before
    tail: float  #: of it, from the moment when `TAIL` of its responses were finished
    waited_for_scores: float
    logprob: float
    train: float
    sync: float
    engines_sampling: float  #: share
    engines_in_tail: float  #: share: done, while another engine still samples
    engines_waiting: float  #: share: nothing to sample, or paused, until the trainer is done
    trainer_idle: float  #: share
    occupancy: float  #: running sequences over `max_num_seqs`, mean over engines and the time of sampling
    staleness_mean: float  #: updates' rounds between a token's weights and those it is trained with, mean over tokens
    staleness_max: int  #: of a sample's oldest token
    tokens: int  #: of the round's responses
    prefilled: int  #: tokens computed into caches
    preemptions: int
    events: int

    @property
    def seconds(self) -> float:
        """Of the round."""
        return self.end - self.begin

    @property
    def engines_idle(self) -> float:
        """Share: in the tail and waiting."""
        return self.engines_in_tail + self.engines_waiting

    @property
    def devices_idle(self) -> float:
        """Share of the time in which nothing runs on devices that engines and trainer share, mean over them."""
        return max(0.0, self.engines_idle + self.trainer_idle - 1 + self.sync / self.seconds)


@dataclass
class _Played:
    """When who worked."""

    sampling: list[tuple[Sampled, list[PlayedGroup]]] = field(default_factory=list)  #: with the groups that the round trains on
    working: list[Span] = field(default_factory=list)  #: trainer
    syncing: list[Span] = field(default_factory=list)


def simulate(setup: Setup, mode: Mode, lengths: LengthSource, rounds: int, seed: int = 0) -> list[Round]:
    """Play so many rounds from the start of a run on. The same arguments give the same result to the bit.

    Raises ConfigError: the mode needs engines of their own, or a response does not fit into an engine's cache.
    """
    if mode.steps_off and setup.colocated:
        raise ConfigError("one step off needs engines on devices of their own: beside the trainer they cannot work while it does")
    random = np.random.default_rng(seed)
    in_flight = math.ceil(setup.prompts * mode.oversampling)
    carried: list[PlayedGroup] = []
    played = _Played()

    def sample(start: float, version: int) -> Sampled:
        nonlocal carried
        drawn = lengths.draw(in_flight - len(carried), setup.group_size, random)
        groups = carried + [make_group(setup.prompt_tokens, row) for row in drawn.tolist()]
        sampled = sample_round(setup.engines, groups, start=start, version=version, needed=setup.prompts)
        batch = sampled.complete[: setup.prompts]
        taken = set(map(id, batch))
        carried = [group for group in groups if id(group) not in taken]
        played.sampling.append((sampled, batch))
        return sampled

    result: list[Round] = []
    trained = 0.0  # when the trainer was done with the round before
    current = sample(0.0, version=0)
    for number in range(1, rounds + 1):
        sampled, batch = played.sampling[number - 1]
        scored = max(sampled.end, _scored(setup.scorers, batch, sampled.start))
        begin = ready = max(current.end, trained)
        if mode.steps_off:
            if number > 1:
                ready += setup.trainer.sync
                played.syncing.append((begin, ready))
            current = sample(ready, version=number - 1)  # after the last round, too: engines do not know that it is the last
        begin = max(ready, scored)
        tokens = sum(group.prompt_tokens + response.length for group in batch for response in group.responses)
        logprob, train = setup.trainer.logprob.of(tokens), setup.trainer.train.of(tokens)
        end = begin + logprob + train
        played.working.append((begin, end + setup.trainer.rest))
        last, trained = trained, end + setup.trainer.rest
        if not mode.steps_off:
            played.working[-1] = (begin, end)
            played.syncing.append((end, end + setup.trainer.sync))
            played.working.append((end + setup.trainer.sync, trained + setup.trainer.sync))
            trained += setup.trainer.sync
            if number < rounds:
                current = sample(trained, version=number)
        result.append(_measure_round(setup, played, number, (last, trained), begin - ready, logprob, train))
    return result


def _scored(scorers: Scorers, batch: Sequence[PlayedGroup], start: float) -> float:
    """When the last response of a round has its score. Groups that were complete before the round began have theirs."""
    free = [start] * scorers.workers
    for group in sorted(batch, key=lambda group: group.finished_at):
        for _ in group.responses if group.finished_at > start and scorers.seconds else ():
            heapq.heapreplace(free, max(free[0], group.finished_at) + scorers.seconds)
    return max(max(free), max((group.finished_at for group in batch), default=start)) + scorers.fixed


def _measure_round(setup: Setup, played: _Played, number: int, window: Span, waited: float, logprob: float, train: float) -> Round:
    sampled, batch = played.sampling[number - 1]
    seconds = window[1] - window[0]
    sampling = tail = 0.0
    for other, _ in played.sampling[max(0, number - 2) :]:
        for busy in other.busy:
            sampling += _seconds_within((other.start, other.start + busy), window)
            tail += _seconds_within((other.start + busy, other.end), window)
    syncing = sum(_seconds_within(span, window) for span in played.syncing[-2:])
    working = sum(_seconds_within(span, window) for span in played.working[-4:])
    responses = [response for group in batch for response in group.responses]
    tokens = sum(response.length for response in responses)
    begun = math.ceil(TAIL * len(sampled.finished)) - 1
    trained_with = number - 1
    of_engine = 1 / (setup.engines.count * seconds)
    return Round(
        number=number,
        begin=window[0],
        end=window[1],
        rollout=sampled.end - sampled.start,
        tail=sampled.end - sampled.finished[begun] if sampled.finished else 0.0,
        waited_for_scores=waited,
        logprob=logprob,
        train=train,
        sync=syncing,
        engines_sampling=sampling * of_engine,
        engines_in_tail=tail * of_engine,
        engines_waiting=max(0.0, 1 - (sampling + tail) * of_engine - syncing / seconds),
        trainer_idle=max(0.0, 1 - (working + syncing) / seconds),
        occupancy=sampled.sequence_seconds
        / (setup.engines.count * setup.engines.max_num_seqs * max(sampled.end - sampled.start, 1e-12)),
        staleness_mean=trained_with - sum(response.version_tokens for response in responses) / tokens,
        staleness_max=trained_with - min(response.oldest for response in responses),
        tokens=tokens,
        prefilled=sampled.prefilled,
        preemptions=sampled.preemptions,
        events=sampled.events,
    )


def _seconds_within(span: Span, window: Span) -> float:
    return max(0.0, min(span[1], window[1]) - max(span[0], window[0]))
