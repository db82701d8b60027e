"""The sampling of a round as discrete events: engines with a limit of sequences and of cache, which share a queue of prompts.

An engine computes one token of every running sequence in a step. Between two changes of what runs, the steps form a series whose
sum is known, so that an event is a change and not a token: the work is O(responses x log responses), and as much for every place in
a cache that is lost, whatever the lengths. Engines take prompts by the rule of `rollout.prompt_queue`, and a sequence loses its
place as in vLLM's scheduler: the last that came goes, waits first in line, and is computed again.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from megatron_r1.errors import ConfigError
from megatron_r1.rollout.prompt_queue import PromptQueue, Take, take_all


@dataclass(frozen=True)
class EngineSpeed:
    """How long one engine's work takes, in seconds."""

    #: (sequences, seconds of a step with so many), sequences rising: between two it is a straight line, below the first it is as
    #: there, and above the last the last line goes on
    decode: tuple[tuple[int, float], ...]
    context_seconds: float = 0.0  #: in every step, for every token that a sequence has so far, prompt included
    prefill_seconds: float = 0.0  #: for every token that enters the cache without having been sampled there

    def step_seconds(self, most: int) -> list[float]:
        """Seconds of a step with 0, 1, ... `most` sequences, without their contexts."""
        points = sorted(self.decode)
        (left, low), (right, high) = points[-2:] if len(points) > 1 else (points[0], (points[0][0] + 1, points[0][1]))
        slope = (high - low) / (right - left)
        table, at = [0.0], 0
        for count in range(1, most + 1):
            while at + 1 < len(points) and points[at + 1][0] <= count:
                at += 1
            (n, seconds), following = points[at], points[at + 1 : at + 2]
            if count <= n:
                table.append(seconds)
            elif following:
                ((m, later),) = following
                table.append(seconds + (later - seconds) * (count - n) / (m - n))
            else:
                table.append(seconds + slope * (count - n))
        return table


@dataclass(frozen=True)
class PlayedEngines:
    """The engines of a job."""

    count: int
    max_num_seqs: int  #: sequences that one computes at a time
    speed: EngineSpeed
    cache_tokens: int | None = None  #: that one's cache holds; None: enough for all
    dispatch: Literal["queue", "fixed"] = "queue"  #: as `rollout.dispatch`
    shares_prompts: bool = True  #: responses to one prompt share its place in an engine's cache
    start_seconds: float = 0.0  #: from the beginning of a round's sampling to its first step


@dataclass(slots=True, eq=False)
class Response:
    """One response. It may need several rounds, if rounds end before it does."""

    group: PlayedGroup
    length: int  #: tokens that it will have
    done: int = 0  #: tokens that it has
    is_finished: bool = False
    oldest: int = -1  #: version of the weights that sampled its first token
    version_tokens: int = 0  #: sum over its tokens of the version that sampled them


@dataclass(slots=True, eq=False)
class PlayedGroup:
    """A prompt with all its responses, which one engine samples."""

    prompt_tokens: int
    responses: list[Response] = field(default_factory=list)
    left: int = 0  #: responses that are not finished
    finished_at: float = 0.0  #: seconds; when `left` became 0


def make_group(prompt_tokens: int, lengths: Iterable[int]) -> PlayedGroup:
    """A group that nothing was sampled of."""
    group = PlayedGroup(prompt_tokens)
    group.responses = [Response(group, int(length)) for length in lengths]
    group.left = len(group.responses)
    return group


@dataclass
class Sampled:
    """What the sampling of a round was. Times in seconds on the clock of `start`."""

    start: float
    end: float  #: the last response of the round was finished
    busy: list[float]  #: seconds of each engine until it had nothing more to do
    sequence_seconds: float  #: sum over engines of running sequences times seconds
    finished: list[float]  #: when each response was finished, in the order of time
    complete: list[PlayedGroup]  #: groups of which all responses are finished, in the order of time
    tokens: int  #: that were sampled
    prefilled: int  #: tokens that were computed into a cache without being sampled
    steps: list[int]  #: of each engine
    sampled: list[int]  #: tokens that each engine sampled
    preemptions: int  #: times that a sequence lost its place in the cache
    events: int  #: that were played


class _Engine:
    """One engine while a round is sampled. `step` counts its steps; what runs is kept by the step that it is finished in."""

    def __init__(self, engines: PlayedEngines, table: list[float], groups: Sequence[PlayedGroup], take: Take, start: float) -> None:
        self._groups = groups
        self._most, self._table, self._speed, self._take = engines.max_num_seqs, table, engines.speed, take
        self._cache, self._shares = engines.cache_tokens, engines.shares_prompts
        self.time, self.step = start, 0
        self.running: dict[int, tuple[Response, int]] = {}  # serial number -> the response, and the step that it came in
        self._finishing: list[tuple[int, int]] = []  # heap of (step, serial number); those that lost their place stay in it
        self._waiting: deque[Response] = deque()
        self._prompts: dict[PlayedGroup, int] = {}  # running responses of each group
        self._serial = self._unfinished = 0
        self._held = self._context = self._prefill = 0  # tokens: in the cache; read by the next step; to compute before it
        self._may_ask, self._is_last, self._asks_again = True, False, False
        self.busy_until = start
        self.sequence_seconds = 0.0
        self.sampled = self.prefilled = self.preemptions = 0

    def seconds(self, steps: int) -> float:
        """Of the next steps, if nothing changes what runs."""
        running = len(self.running)
        tokens = steps * self._context + running * (steps * (steps - 1) // 2)
        own = steps * self._table[running] + self._speed.context_seconds * tokens
        return own + (self._speed.prefill_seconds * self._prefill if steps else 0.0)

    def steps_to_event(self) -> int | None:
        """Steps until what runs changes, or until it asks for more; None: it has nothing to do."""
        while self._finishing and self._finishing[0][1] not in self.running:
            heapq.heappop(self._finishing)
        if not self.running:
            return None
        steps = self._finishing[0][0] - self.step
        if self._cache is not None:
            steps = min(steps, (self._cache - self._held) // len(self.running))
        return min(steps, 1) if self._asks_again else steps

    def advance(self, steps: int) -> None:
        """Compute so many steps, in which nothing changes."""
        seconds, running = self.seconds(steps), len(self.running)
        self.time += seconds
        self.step += steps
        self.sequence_seconds += seconds * running
        self._held += steps * running
        self._context += steps * running
        self.sampled += steps * running
        if steps:
            self.prefilled += self._prefill
            self._prefill = 0
        self.busy_until = self.time

    def change(self) -> tuple[int, list[PlayedGroup]]:
        """What happens after the steps: responses are finished, or lose their place, or come.

        Returns:
            The number of responses that are finished, and the groups that are complete.
        """
        finished, complete = 0, []
        while self._finishing and self._finishing[0][0] == self.step:
            _, serial = heapq.heappop(self._finishing)
            if serial not in self.running:
                continue
            response = self._remove(serial)
            response.is_finished = True
            finished += 1
            response.group.left -= 1
            if not response.group.left:
                response.group.finished_at = self.time
                complete.append(response.group)
        if complete:
            self._unfinished -= len(complete)
            self._may_ask = True
        if not finished and self._cache is not None and self._cache - self._held < len(self.running):
            self._preempt(self._cache)
        else:
            self._admit()
        self.ask()
        return finished, complete

    def ask(self) -> None:
        """Ask for more prompts if nothing waits, as `rollout.vllm.stream` does: once a step, until there are none for it."""
        self._asks_again = False
        if self._waiting or self._is_last or not self._may_ask:
            return
        taken = self._take(self._unfinished)
        self._is_last, self._may_ask = taken.is_last, bool(taken.positions)
        self._unfinished += len(taken.positions)
        for position in taken.positions:
            self._waiting.extend(response for response in self._groups[position].responses if not response.is_finished)
        self._admit()
        self._asks_again = bool(taken.positions) and not self._waiting and not self._is_last

    def _admit(self) -> None:
        while self._waiting and len(self.running) < self._most:
            response = self._waiting[0]
            is_shared = self._shares and response.group in self._prompts
            needed = response.done + (0 if is_shared else response.group.prompt_tokens)
            if self._cache is not None and self._held + needed + len(self.running) + 1 > self._cache:
                return
            self._waiting.popleft()
            self._serial += 1
            self.running[self._serial] = response, self.step
            heapq.heappush(self._finishing, (self.step + response.length - response.done, self._serial))
            self._prompts[response.group] = self._prompts.get(response.group, 0) + 1
            self._held += needed
            self._context += response.done + response.group.prompt_tokens
            self._prefill += needed

    def _preempt(self, cache: int) -> None:
        while cache - self._held < len(self.running):
            self._waiting.appendleft(self._remove(next(reversed(self.running))))
            self.preemptions += 1

    def _remove(self, serial: int) -> Response:
        """End the running of a response, which keeps the tokens that it has."""
        response, came = self.running.pop(serial)
        response.done += self.step - came
        group = response.group
        self._prompts[group] -= 1
        is_shared = self._shares and self._prompts[group] > 0
        if not self._prompts[group]:
            del self._prompts[group]
        self._held -= response.done + (0 if is_shared else group.prompt_tokens)
        self._context -= response.done + group.prompt_tokens
        return response

    def stop(self, time: float) -> None:
        """End the sampling at a time that no event of this engine comes before: what runs keeps its whole steps."""
        low, high = 0, self.steps_to_event() or 0
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.time + self.seconds(middle) <= time else (low, middle - 1)
        if self.running:
            self.advance(low)
            self.busy_until = time
        for serial in list(self.running):
            self._remove(serial)


def sample_round(
    engines: PlayedEngines, groups: Sequence[PlayedGroup], *, start: float = 0.0, version: int = 0, needed: int | None = None
) -> Sampled:
    """Play the sampling of groups, which may be sampled in part from rounds before. They are changed.

    Args:
        groups: in the order of the queue.
        start: seconds on the clock of the round.
        version: of the weights that the engines hold.
        needed: groups that must be complete for the round to end; None: all.

    Raises ConfigError if a response does not fit into an engine's cache.
    """
    needed = len(groups) if needed is None else needed
    _check_room(engines, groups)
    before = [(response, response.done) for group in groups for response in group.responses if not response.is_finished]
    complete = [group for group in groups if not group.left]
    table = engines.speed.step_seconds(engines.max_num_seqs)
    players = [_Engine(engines, table, groups, take, start + engines.start_seconds) for take in _takes(engines, groups)]
    agenda: list[tuple[float, int, int]] = []  # (time, engine, its steps until then)
    finished: list[float] = []
    events = 0

    def plan(number: int) -> None:
        steps = players[number].steps_to_event()
        if steps is not None:
            heapq.heappush(agenda, (players[number].time + players[number].seconds(steps), number, steps))

    for player in players:
        player.ask()
    for number in range(len(players)):
        plan(number)
    end = start
    while agenda and (len(complete) < needed or agenda[0][0] <= end):
        _, number, steps = heapq.heappop(agenda)
        player = players[number]
        player.advance(steps)
        ended, whole = player.change()
        if ended:
            finished += [player.time] * ended
            end = player.time
        complete += whole
        plan(number)
        events += 1
    for player in players:
        player.stop(end)
    for response, done in before:
        if response.done > done:
            response.oldest = version if response.oldest < 0 else response.oldest
            response.version_tokens += version * (response.done - done)
    return Sampled(
        start=start,
        end=end,
        busy=[player.busy_until - start for player in players],
        sequence_seconds=sum(player.sequence_seconds for player in players),
        finished=finished,
        complete=complete,
        tokens=sum(response.done - done for response, done in before),
        prefilled=sum(player.prefilled for player in players),
        steps=[player.step for player in players],
        sampled=[player.sampled for player in players],
        preemptions=sum(player.preemptions for player in players),
        events=events,
    )


def _takes(engines: PlayedEngines, groups: Sequence[PlayedGroup]) -> list[Take]:
    """How each engine gets its prompts: by `rollout.collective`'s rules."""
    left = [position for position, group in enumerate(groups) if group.left]
    if engines.count == 1 or engines.dispatch == "fixed":
        return [take_all([at for at in left if at % engines.count == number]) for number in range(engines.count)]
    taken = 0

    def add(size: int) -> int:
        nonlocal taken
        taken += size
        return taken

    return [PromptQueue(left, engines.count, add) for _ in range(engines.count)]


def _check_room(engines: PlayedEngines, groups: Sequence[PlayedGroup]) -> None:
    longest = max((group.prompt_tokens + response.length for group in groups for response in group.responses), default=0)
    if engines.cache_tokens is not None and longest + 1 > engines.cache_tokens:
        raise ConfigError(
            f"a cache of {engines.cache_tokens:,} tokens has no room for a prompt and its response of {longest:,} tokens together: "
            "make it larger, or the responses shorter"
        )
