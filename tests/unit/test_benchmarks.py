"""The benchmark commands start, agree with their peer at the smallest size, and take ratios of neighbours in time."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import measure
from benchmarks.measure import Comparison, Side, compare

ROOT = Path(__file__).resolve().parents[2]


def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"benchmarks.{module}", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("module", ["train_step", "rollout"])
def test_help(module: str) -> None:
    result = run(module, "--help")
    assert result.returncode == 0
    assert "--repeats" in result.stdout and "--out FILE.json" in result.stdout


def test_train_step_compares_both_workloads(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    result = run("train_step", "--hidden", "32", "--sequences", "8", "--repeats", "1", "--out", str(out))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("the first steps agree") == 2
    content = json.loads(out.read_text())
    assert content["machine"]["threads"] == 1
    assert [len(c["ours"]["wall_seconds"]) for c in content["train_step"]] == [1, 1]
    assert list(tmp_path.iterdir()) == [out]


def test_a_missing_folder_is_told_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def benchmark(arguments: argparse.Namespace) -> None:
        pytest.fail("measured first")

    assert measure.run(benchmark, argparse.Namespace(out=tmp_path / "none" / "result.json")) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "there is no folder" in message


def test_who_begins_alternates() -> None:
    order: list[str] = []

    def work(name: str) -> int:
        order.append(name)
        return 1

    compare("", lambda: work("ours"), lambda: work("peer"), repeats=3)
    assert order == ["ours", "peer"] + ["ours", "peer", "peer", "ours", "ours", "peer"]


def test_ratio_is_the_median_of_neighbours() -> None:
    # A load that makes one repetition ten times slower for both must not show.
    ours = Side([10, 10, 10], [1.0, 10.0, 2.0], [1.0, 1.0, 1.0])
    peer = Side([20, 20, 20], [4.0, 40.0, 4.0], [1.0, 1.0, 1.0])
    comparison = Comparison("", ours, peer)
    assert comparison.speed_ratio == 2.0
    assert comparison.cpu_ratio == 0.5
    assert comparison.ours.per_second == 5.0
