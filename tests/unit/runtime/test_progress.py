"""Progress without a terminal: a line now and then, and always the last."""

from __future__ import annotations

import io
import re

import pytest

from megatron_r1.runtime import progress
from megatron_r1.runtime.progress import Progress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_every_ten_seconds_and_at_the_end(clock, capsys):
    with Progress(10, "GRPO", initial=2) as bar:
        for _ in range(8):
            clock[0] += 4.0
            bar.show({"loss": 0.123456})
            bar.advance()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "GRPO: 5/10, 12 s, about 20 s left, loss=0.1235",
        "GRPO: 8/10, 24 s, about 8 s left, loss=0.1235",
        "GRPO: 10/10, 32 s, about 0 s left, loss=0.1235",
    ]


def test_other_ranks_are_silent(capsys):
    with Progress(1, "GRPO", enabled=False) as bar:
        bar.advance()
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress(3, "GRPO", initial=1) as bar:
        bar.advance()
        bar.show({"reward": 1.0})
        bar.advance()
    assert re.search(r"GRPO: 100%.*3/3.*reward=1", capsys.readouterr().err)


def test_more_than_the_total_leaves_no_negative_time(clock, capsys):
    with Progress(4, "GRPO") as bar:
        clock[0] += 12.0
        bar.advance(5)
    assert capsys.readouterr().err == "GRPO: 5/4, 12 s, about 0 s left\n"


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_bar_does_not_see_the_wall_clock_jump(clock, monkeypatch, jump):
    wall = [1e9]
    monkeypatch.setattr("tqdm.std.time", lambda: wall[0])
    bar = progress._Bar(total=10, file=io.StringIO(), mininterval=0)
    for _ in range(4):
        clock[0] += 5.0
        wall[0] += jump
        bar.update(1)
    assert bar.format_dict["elapsed"] == 20.0 and bar.format_dict["rate"] == pytest.approx(0.2)
    bar.close()
