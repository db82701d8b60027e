"""The planner against published runs: the bars hold, every row is shown, and large errors are explained."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import plan_vs_published
from benchmarks.plan_vs_published import LARGE, MEMORY_BAR, TIME_BARS, beyond_bars, describe, median_error
from benchmarks.published import memory, pretraining, rounds, transfers
from benchmarks.published.explained import EXPLAINED
from benchmarks.published.predict import NOT_PREDICTED, Compared, compare_memory, compare_times


@pytest.fixture(scope="module")
def found() -> list[Compared]:
    return compare_times()


@pytest.fixture(scope="module")
def peaks() -> list[Compared]:
    return compare_memory()


def test_medians_are_within_their_bars(found: list[Compared], peaks: list[Compared]) -> None:
    assert TIME_BARS == {"fitted": 0.15, "held out": 0.25} and MEMORY_BAR == 0.05
    assert beyond_bars(found, peaks) == []
    syncs = [one for one in found if one.what == "sync"]
    assert median_error(one for one in syncs if one.set == "held out") <= 0.25


def test_a_median_beyond_its_bar_is_named_and_ends_with_1(
    found: list[Compared], peaks: list[Compared], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [replace(one, predicted=one.measured * 1.2) for one in found]
    larger = [replace(one, predicted=one.measured * 0.9) for one in peaks]
    assert beyond_bars(wrong, larger) == ["time, fitted", "memory"]
    monkeypatch.setattr(plan_vs_published, "compare_times", lambda: wrong)
    monkeypatch.setattr(plan_vs_published, "compare_memory", lambda: peaks)
    monkeypatch.setattr("sys.argv", ["plan_vs_published"])
    assert plan_vs_published.main() == 1
    assert capsys.readouterr().err == "beyond the bar: time, fitted\n"


def test_every_row_is_shown_once(found: list[Compared], peaks: list[Compared]) -> None:
    assert [one.row for one in peaks] == [row.name for row in memory.PEAKS]
    rows = [*pretraining.STEPS, *rounds.ROUNDS, *transfers.TRANSFERS]
    assert [row.name for row in rows] == list(dict.fromkeys(one.row for one in found))
    numbers = len(pretraining.STEPS) + len(transfers.TRANSFERS) + sum(len(row.seconds) for row in rounds.ROUNDS)
    assert len(found) == numbers
    text = describe(found, peaks)
    assert all(name in text for name in [row.name for row in [*rows, *memory.PEAKS]] + [row.name for row in NOT_PREDICTED])
    assert all(row.source for row in [*rows, *NOT_PREDICTED]) and all(row.why for row in NOT_PREDICTED)


def test_large_errors_and_no_others_are_explained(found: list[Compared], peaks: list[Compared]) -> None:
    assert {(one.row, one.what) for one in found + peaks if abs(one.error) > LARGE} == set(EXPLAINED)


def test_no_set_of_efficiencies_rests_on_a_single_row(found: list[Compared]) -> None:
    devices = {row.name: row.device for row in [*pretraining.STEPS, *rounds.ROUNDS, *transfers.TRANSFERS]}
    kinds = {"H100": "Hopper", "H800": "Hopper", "B200": "Blackwell", "GB200": "Blackwell", "H20": "H20"}
    fitted = [kinds[devices[one.row]] for one in found if one.set == "fitted"]
    assert all(fitted.count(kind) >= 8 for kind in kinds.values())
