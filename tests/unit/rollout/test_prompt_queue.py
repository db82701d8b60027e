"""The queue of prompts: engines of uneven speed end together, and what is sampled does not depend on who sampled it."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from megatron_r1.model.presets import PRESETS
from megatron_r1.rollout.channel.engine_channel import ASK
from megatron_r1.rollout.prompt_queue import PromptQueue, Take, take_all
from megatron_r1.rollout.vllm.stream import Answer, PromptFeed, sample_stream
from megatron_r1.rollout.vllm_client import VllmProcessEngine
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from tests.pipeline.engine_cases import options

PROMPTS = [Prompt(f"p{i}", "", "", "", (2, 3)) for i in range(64)]
SAMPLING = Sampling(n=4, temperature=1.0, top_p=1.0, max_tokens=32)


class Clock:
    """Engines that step one after the other, in the order of simulated time."""

    def __init__(self, engines: int) -> None:
        self._times = dict.fromkeys(range(engines), 0.0)
        self._changed = threading.Condition()

    def advance(self, engine: int, ticks: float) -> None:
        with self._changed:
            self._times[engine] += ticks
            self._changed.notify_all()
            self._changed.wait_for(lambda: min((time, of) for of, time in self._times.items())[1] == engine)

    def leave(self, engine: int) -> float:
        with self._changed:
            self._changed.notify_all()
            return self._times.pop(engine)


class SlowEngine:
    """A `RequestEngine` with room for some requests. A request's seed decides what it answers, and how long that is."""

    def __init__(self, clock: Clock, number: int, ticks: float, room: int) -> None:
        self._clock, self._number, self._ticks, self._room = clock, number, ticks, room
        self._waits: deque[tuple[str, int, int]] = deque()
        self._runs: dict[str, list[int]] = {}

    def add(self, request_id: str, token_ids: list[int], seed: int | None) -> None:
        tokens = min(SAMPLING.max_tokens, 1 + int(random.Random(seed).expovariate(0.1)))
        self._waits.append((request_id, seed, tokens))

    def step(self) -> list[tuple[str, Answer]]:
        while self._waits and len(self._runs) < self._room:
            request_id, seed, tokens = self._waits.popleft()
            self._runs[request_id] = [seed, tokens]
        self._clock.advance(self._number, self._ticks)
        for run in self._runs.values():
            run[1] -= 1
        done = {
            request_id: (np.array([seed % 448], np.int32), np.zeros(1, np.float32), True)
            for request_id, (seed, left) in self._runs.items()
            if not left
        }
        self._runs = {request_id: run for request_id, run in self._runs.items() if run[1]}
        return list(done.items())

    def waiting(self) -> int:
        return len(self._waits)

    def progress(self) -> int:
        return 0


class NearConnection:
    """The trainer is at the other end, and answers at once."""

    def __init__(self, on_part: Callable[[Any], Any]) -> None:
        self._on_part = on_part
        self._answers: deque[Any] = deque()

    def send(self, message: tuple[None, Any]) -> None:
        reply = self._on_part(message[1])
        if message[1] == ASK:
            self._answers.append(reply)

    def poll(self, timeout: float) -> bool:
        return bool(self._answers)

    def recv(self) -> Any:
        return self._answers.popleft()


def play(ticks: list[float], room: int, takes: list[Take]) -> tuple[dict[int, RolloutGroup], list[float]]:
    """Let engines sample `PROMPTS`, one that needs `ticks` for a step each: groups, and when each engine ended."""
    clock = Clock(len(ticks))
    engines = [SlowEngine(clock, number, of, room) for number, of in enumerate(ticks)]

    def run(number: int) -> dict[int, RolloutGroup]:
        trainer = object.__new__(VllmProcessEngine)
        trainer.options, trainer.decode, trainer.version = options(PRESETS["tiny"]), str, 0
        trainer._call = lambda name, sampling, first, is_last, on_part: sample_stream(
            engines[number], PromptFeed(NearConnection(on_part), first, is_last), sampling.n
        )
        clock.advance(number, 0.0)
        try:
            return trainer.sample(PROMPTS, SAMPLING, 7, takes[number])
        finally:
            ends[number] = clock.leave(number)

    ends = [0.0] * len(ticks)
    groups: dict[int, RolloutGroup] = {}
    with ThreadPoolExecutor(len(ticks)) as threads:
        for of_engine in threads.map(run, range(len(ticks))):
            assert not groups.keys() & of_engine.keys(), "sampled twice"
            groups |= of_engine
    return groups, ends


def queues(engines: int, positions: range | None = None) -> tuple[list[PromptQueue], list[int]]:
    """The ends of one queue, and the counter's steps."""
    steps: list[int] = []

    def add(amount: int) -> int:
        steps.append(amount)
        return sum(steps)

    return [PromptQueue(range(len(PROMPTS)) if positions is None else positions, engines, add) for _ in range(engines)], steps


def responses(groups: dict[int, RolloutGroup]) -> list[list[list[int]]]:
    assert [groups[at].prompt for at in range(len(PROMPTS))] == PROMPTS
    return [[rollout.token_ids.tolist() for rollout in groups[at].rollouts] for at in range(len(PROMPTS))]


@pytest.mark.parametrize(("ticks", "most"), [([1.0, 1.0, 1.0, 2.0], 0.75), ([1.0, 1.2, 0.8, 1.5], 0.75), ([1.0] * 4, 1.05)])
def test_engines_that_are_done_take_more_and_sample_the_same(ticks: list[float], most: float) -> None:
    number = len(ticks)
    alone, _ = play([1.0], 8, [take_all(range(len(PROMPTS)))])
    fixed, static_ends = play(ticks, 8, [take_all(range(i, len(PROMPTS), number)) for i in range(number)])
    pulled, ends = play(ticks, 8, list(queues(number)[0]))
    assert responses(alone) == responses(fixed) == responses(pulled)
    assert len({tuple(map(tuple, row)) for row in responses(alone)}) == len(PROMPTS), "each prompt has seeds of its own"
    assert max(ends) <= most * max(static_ends), (ends, static_ends)
    longest = SAMPLING.max_tokens * max(ticks)  # from its first token on, a response is bound to its engine
    assert max(ends) - min(ends) <= 2 * longest, ends


def test_no_engine_takes_all_that_it_has_room_for() -> None:
    """The first to ask would have it all, and the others nothing."""
    ends, steps = queues(4)
    held = 0
    while got := ends[0](held).positions:
        held += len(got)
    assert held == len(PROMPTS) // 4 and len(steps) > 4, "its share, in parts"
    assert not ends[0](held).is_last and len(ends[0](held - 1).positions) == 1, "what it has finished makes room"


def test_an_engine_without_prompts_gets_one_or_the_end() -> None:
    ends, _ = queues(3, range(10, 15))
    taken: list[int] = []
    over: set[int] = set()
    for number in itertools.cycle(range(3)):
        got = ends[number](0)
        taken += got.positions
        assert got.positions or got.is_last
        over |= {number} if got.is_last else set()
        if len(over) == 3:
            break
    assert taken == [10, 11, 12, 13, 14]
    assert queues(1, range(0))[0][0](0).is_last


@pytest.mark.parametrize("engines", [2, 8, 64, 512])
def test_a_round_of_8192_responses_costs_the_store_few_requests(engines: int) -> None:
    """At most 4 E (2 + ln(P / 4E)) for P prompts and E engines that take turns; one a prompt and engine at the worst."""
    prompts = 8192 // 16
    ends, steps = queues(engines, range(prompts))
    taken: list[int] = []
    over: set[int] = set()
    for number in itertools.cycle(range(engines)):
        if number not in over:
            got = ends[number](0)
            taken += got.positions
            over |= {number} if got.is_last else set()
        if len(over) == engines:
            break
    assert taken == list(range(prompts))
    assert len(steps) <= min(prompts + engines, 4 * engines * (2 + math.log(max(1.0, prompts / (4 * engines)))))


def test_a_call_that_fails_leaves_no_reply_on_the_connection() -> None:
    """The next call would take it for its own."""
    connection = NearConnection(lambda part: ([(3, [2], [1])], False))
    feed = PromptFeed(connection, [], is_last=False)
    feed.ask()
    feed.close()
    assert not connection.poll(0)
