"""The sampling of a round: sums in closed form, and the same as a scheduler that goes token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines, PlayedGroup, Response, make_group, sample_round
from megatron_r1.plan.simulate_lengths import Lognormal

STEP = EngineSpeed(((1, 0.5),))


def groups_of(rows: Sequence[Sequence[int]], prompt_tokens: int = 0) -> list[PlayedGroup]:
    return [make_group(prompt_tokens, row) for row in rows]


def test_equal_answers_leave_no_engine_idle() -> None:
    sampled = sample_round(PlayedEngines(4, 64, STEP, dispatch="fixed"), groups_of([[100] * 8] * 16), start=3.0)
    assert sampled.end == 3.0 + 100 * 0.5 and sampled.busy == [50.0] * 4
    assert sampled.steps == [100] * 4 and sampled.sampled == [100 * 8 * 4] * 4 and sampled.tokens == 100 * 8 * 16
    assert sampled.sequence_seconds == 16 * 8 * 50.0 and len(sampled.complete) == 16


@pytest.mark.parametrize("engines", (2, 5))
def test_one_long_answer_keeps_the_other_engines_waiting(engines: int) -> None:
    """Idle share of sampling: of E engines, E - 1 wait from step L to step M of the long response: (E - 1) (M - L) / (E M)."""
    short, long = 40, 400
    rows = [[short] * 3 for _ in range(engines)]
    rows[1][2] = long
    sampled = sample_round(PlayedEngines(engines, 8, STEP, dispatch="fixed"), groups_of(rows))
    idle = 1 - sum(sampled.busy) / (engines * (sampled.end - sampled.start))
    assert idle == pytest.approx((engines - 1) * (long - short) / (engines * long), rel=1e-12)


def test_a_limit_of_sequences_makes_waves() -> None:
    speed = EngineSpeed(((1, 1.0), (4, 2.5)))
    sampled = sample_round(PlayedEngines(1, 4, speed), groups_of([[10] * 11]))
    assert sampled.end == pytest.approx(2 * 10 * 2.5 + 10 * 2.0)  # 4, 4 and 3 at a time
    assert sampled.steps == [30] and sampled.events == 3


def test_contexts_and_prompts_take_time_in_closed_form() -> None:
    prompt, length = 30, 7
    speed = EngineSpeed(((1, 1.0),), context_seconds=1e-3, prefill_seconds=1e-2)
    sampled = sample_round(PlayedEngines(1, 8, speed), groups_of([[length] * 2], prompt))
    read = 2 * (length * prompt + length * (length - 1) // 2)
    assert sampled.prefilled == prompt  # both have it from one computation
    assert sampled.end == pytest.approx(length + 1e-3 * read + 1e-2 * prompt)
    alone = sample_round(PlayedEngines(1, 8, speed, shares_prompts=False), groups_of([[length] * 2], prompt))
    assert alone.prefilled == 2 * prompt


def test_steps_between_and_beyond_the_points() -> None:
    assert EngineSpeed(((2, 1.0), (4, 2.0), (5, 4.0))).step_seconds(7) == [0, 1.0, 1.0, 1.5, 2.0, 4.0, 6.0, 8.0]
    assert EngineSpeed(((3, 1.5),)).step_seconds(4) == [0, 1.5, 1.5, 1.5, 1.5]


def play_token_by_token(lengths: Sequence[int], prompt: int, most: int, cache: int, speed: EngineSpeed) -> tuple[float, int, int]:
    """One engine with one response a prompt, one step after the other: seconds, steps and lost places."""
    waiting = deque([number, 0] for number in range(len(lengths)))
    running: list[list[int]] = []
    table = speed.step_seconds(most)
    seconds, steps, lost = 0.0, 0, 0
    may_admit = True
    while waiting or running:
        held = sum(prompt + done for _, done in running)
        while cache - held < len(running):
            number, done = running.pop()
            waiting.appendleft([number, done])
            held -= prompt + done
            lost, may_admit = lost + 1, False
        prefill = 0
        while may_admit and waiting and len(running) < most and held + prompt + waiting[0][1] + len(running) + 1 <= cache:
            running.append(waiting.popleft())
            held += prompt + running[-1][1]
            prefill += prompt + running[-1][1]
        seconds += speed.prefill_seconds * prefill + table[len(running)]
        seconds += speed.context_seconds * sum(prompt + done for _, done in running)
        steps += 1
        for response in running:
            response[1] += 1
        still = [response for response in running if response[1] < lengths[response[0]]]
        may_admit, running = len(still) < len(running), still
    return seconds, steps, lost


@pytest.mark.parametrize("seed", range(6))
def test_it_is_what_a_scheduler_does_token_by_token(seed: int) -> None:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, 60, size=40).tolist()
    prompt, most = int(random.integers(0, 9)), int(random.integers(2, 12))
    cache = int(random.integers(75, 200))
    speed = EngineSpeed(((1, 0.1), (8, 0.4)), 1e-3, 1e-2)
    groups = groups_of([[length] for length in lengths], prompt)
    sampled = sample_round(PlayedEngines(1, most, speed, cache), groups)
    seconds, steps, lost = play_token_by_token(lengths, prompt, most, cache, speed)
    assert (sampled.steps, sampled.preemptions) == ([steps], lost)
    assert sampled.end == pytest.approx(seconds, rel=1e-9)
    assert all(group.responses[0].done == length for group, length in zip(groups, lengths, strict=True))


def test_a_short_cache_costs_places() -> None:
    lengths = [[50]] * 20
    wide, narrow = (sample_round(PlayedEngines(1, 20, STEP, cache), groups_of(lengths)) for cache in (20 * 51, 300))
    assert wide.preemptions == 0 and wide.end == 25.0
    assert narrow.preemptions > 0 and narrow.end > wide.end


def test_the_work_follows_answers_and_not_tokens() -> None:
    """8,192 responses of up to 32K tokens on 64 engines: an event a finished response, and one for every question for prompts."""
    counts = []
    for scale in (1, 16):
        rows = scale * Lognormal(500, 0.8, 2048, 0.5).draw(512, 16, np.random.default_rng(0))
        sampled = sample_round(PlayedEngines(64, 64, STEP), groups_of(rows.tolist()))
        assert len(sampled.finished) == 8192 and sampled.tokens == rows.sum()
        counts.append(sampled.events)
        assert sampled.events <= 8192 + 512 + 64
    assert counts[0] == pytest.approx(counts[1], rel=0.05)  # short responses end together more often
    assert rows.max() == 32768


def test_events_are_the_same_at_any_scale_where_nothing_is_asked_for() -> None:
    rows = Lognormal(500, 0.8, 2048).draw(32, 16, np.random.default_rng(1))
    counts = [sample_round(PlayedEngines(8, 16, STEP, dispatch="fixed"), groups_of((k * rows).tolist())).events for k in (1, 1000)]
    assert counts[0] == counts[1] <= rows.size


def test_a_round_ends_when_enough_groups_are_complete_and_the_rest_keeps_its_tokens() -> None:
    groups = groups_of([[10, 10], [10, 40], [10, 10]])
    sampled = sample_round(PlayedEngines(1, 6, STEP), groups, needed=2, version=4)
    assert sampled.complete == [groups[0], groups[2]] and sampled.end == 5.0
    late = groups[1].responses[1]
    assert (late.done, late.oldest, late.version_tokens, late.is_finished) == (10, 4, 40, False)
    again = sample_round(PlayedEngines(1, 6, EngineSpeed(((1, 0.5),), prefill_seconds=0.25)), [groups[1]], start=9.0, version=5)
    assert again.prefilled == 10 and again.end == 9.0 + 30 * 0.5 + 10 * 0.25  # what other weights computed is computed again
    assert (late.oldest, late.version_tokens) == (4, 10 * 4 + 30 * 5)


def test_an_engine_that_is_stopped_between_two_steps_keeps_whole_ones() -> None:
    groups = groups_of([[5], [100]])
    speed = EngineSpeed(((1, 0.5),), prefill_seconds=0.3)
    groups[1].responses[0].done = 1  # its engine begins 0.3 s later
    sample_round(PlayedEngines(2, 1, speed, dispatch="fixed"), groups, needed=1)
    assert groups[1].responses[0].done == 1 + int((2.5 - 0.3) / 0.5)


def test_engines_share_one_queue() -> None:
    """With fixed prompts one engine gets all the long ones; from the queue each takes what it has room for."""
    rows = [[300] if number % 2 == 0 else [10] for number in range(64)]
    fixed, queue = (sample_round(PlayedEngines(2, 4, STEP, dispatch=kind), groups_of(rows)) for kind in ("fixed", "queue"))
    assert queue.end < 0.7 * fixed.end and queue.tokens == fixed.tokens


def test_an_answer_that_has_no_room_is_refused() -> None:
    with pytest.raises(ConfigError, match="110 tokens"):
        sample_round(PlayedEngines(1, 1, STEP, cache_tokens=110), groups_of([[100]], 10))
    assert isinstance(make_group(1, [2]).responses[0], Response)
