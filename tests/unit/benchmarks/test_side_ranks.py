"""The processes of a side: they answer orders one after another, rank by rank, and end with the comparison."""

from __future__ import annotations

import sys

import pytest

from benchmarks.processes import CommandFailed
from benchmarks.side_ranks import SideRanks, compare_in_turns, timed_steps

RANK = """
import os, sys, time
from benchmarks.side_ranks import serve, timed_steps
from megatron_r1.errors import ConfigError

def fail(hard):
    if hard:
        sys.exit(7)
    raise ConfigError("there is no such model")

def look():
    print("a library prints")
    return {"rank": os.environ["RANK"], "ranks": os.environ["WORLD_SIZE"], "threads": os.environ["OMP_NUM_THREADS"]}

serve({"look": look, "fail": fail, "steps": timed_steps(lambda: time.sleep(0.001))})
"""


def ranks(count: int = 2) -> SideRanks:
    return SideRanks("ours", [sys.executable, "-c", RANK], count)


def test_every_rank_answers_and_knows_its_place():
    with ranks() as side, ranks(1) as alone:
        assert side.order("look") == [{"rank": str(rank), "ranks": "2", "threads": "1"} for rank in (0, 1)]
        assert alone.order("look")[0]["ranks"] == "1"
        wall, cpu = side.steps(3)
        assert wall >= 0.003 and 0 <= cpu
        found = compare_in_turns("x", side, alone, amount=10, repeats=3, turn_seconds=0.004)
        processes = [*side._processes, *alone._processes]
    assert (
        found.ours.amounts == found.ours.amounts[:1] * 3 and found.ours.amounts[0] % 10 == 0 and len(found.peer.wall_seconds) == 3
    )
    assert found.speed_ratio > 0
    assert [process.returncode for process in processes] == [0, 0, 0]


@pytest.mark.parametrize(("hard", "told"), [(False, "there is no such model"), (True, "ended with code 7 at the order fail")])
def test_a_rank_that_fails_is_told_in_a_line_and_none_is_left(hard, told):
    with pytest.raises(CommandFailed, match=f"rank 0 of ours.* {told}"), ranks() as side:
        processes = side._processes
        side.order("fail", hard=hard)
    assert None not in [process.returncode for process in processes]


def test_the_first_step_of_a_turn_is_not_timed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("benchmarks.side_ranks.time.perf_counter", lambda: now[0])
    lengths = iter([100.0, 1.0, 2.0, 3.0])

    def step() -> None:
        now[0] += next(lengths)

    assert timed_steps(step)(3)["wall_seconds"] == 6.0
