"""`benchmarks/logprob.py` at a small size: it measures, compares and judges."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import logprob
from benchmarks.logprob import Case, Step, naive_bytes
from tests.paths import ROOT
from tests.patience import patient


@pytest.mark.slow
def test_a_small_case(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--tokens", "64", "--hidden", "16", "--vocabulary", "2048", "--repeats", "1", "--threads", "1", "--recomputed"]
    command = [sys.executable, "-m", "benchmarks.logprob", *sizes, "--out", str(out)]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=patient(120))
    # So small a case takes what processes take: only the numbers must agree.
    assert finished.returncode in (0, 1) and "differ" not in finished.stderr, finished.stderr
    (case,) = json.loads(out.read_text())["logprob"]
    assert set(case["steps"]) == {"naive", "fused", "recomputed"} and case["difference"] < 1e-5
    assert [case["steps"][side][0]["guessed"] for side in ("fused", "recomputed")] == [True, None]


def step(side: str, beyond: int, seconds: float) -> Step:
    return Step(side, 8, 4, beyond, beyond, seconds, seconds, None)


@pytest.mark.parametrize(
    ("beyond", "seconds", "told"), [(120, 1.0, None), (130, 1.0, "0.130 of naive's memory"), (100, 1.2, "1.200 of naive's time")]
)
def test_the_bars_are_of_the_largest_size(beyond: int, seconds: float, told: str | None) -> None:
    small = Case(4, 4, {"naive": [step("naive", 10, 1.0)], "fused": [step("fused", 10, 9.0)]}, 0.0)
    large = Case(8, 4, {"naive": [step("naive", 1000, 1.0)] * 2, "fused": [step("fused", beyond, seconds)] * 2}, 0.0)
    problems = logprob.problems_of([small, large, Case(16, 4, {"fused": [step("fused", 1, 1.0)]}, None)])
    assert [told in problem for problem in problems] == ([True] if told else [])
    assert logprob.problems_of([Case(16, 4, {"fused": []}, None)]) == ["hidden size 4: naive fits at no size"]


def test_what_naive_takes() -> None:
    assert naive_bytes(8192, 2048, 129_280, 4) == pytest.approx(14.97e9, rel=1e-3)
