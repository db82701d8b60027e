"""Two thousand bad inputs to all commands: one line and exit code 2, or a right end; no traceback, no hang, no half result."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutate_bytes, mutate_tree
from tests.fuzz.targets import TARGETS
from tests.paths import ROOT
from tests.patience import patient

COUNT = 2000


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[list[str]]]:
    """(what the fuzzer printed, [target, number, end, last line] of every case). In a process of its own, which may fork."""
    lines = tmp_path_factory.mktemp("fuzz") / "lines.tsv"
    command = [sys.executable, "-W", "ignore", "-m", "tests.fuzz", "--count", str(COUNT), "--seed", "0", "--lines", str(lines)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=patient(900), check=False)
    assert done.returncode in (0, 1), done.stderr[-3000:]
    return done.stdout, [line.split("\t", 3) for line in lines.read_text(errors="replace").splitlines() if line.count("\t") >= 3]


def test_nothing_is_found(fuzzed):
    printed, _ = fuzzed
    assert printed.splitlines()[-1] == "0 findings", printed[-6000:]


@pytest.mark.parametrize("name", TARGETS)
def test_cases_of_every_target_get_through_to_its_end(fuzzed, name):
    """Otherwise the good input is bad itself, and what is changed in it is never read."""
    _, cases = fuzzed
    own = [(end, line) for target, _, end, line in cases if target == name]
    assert len(own) >= COUNT * TARGETS[name][1] / 200
    if name == "arguments":
        return
    assert any("holds NaN" in line or end == "exit 0" for end, line in own), own[:5]
    assert any("holds NaN" not in line and end == "exit 2" for end, line in own), own[:5]


def test_a_case_can_be_repeated():
    tree = {"a": [1, {"b": "c"}], "d": None}
    first, second = (mutate_tree(random.Random(7), tree) for _ in range(2))
    assert repr(first) == repr(second) and tree == {"a": [1, {"b": "c"}], "d": None}
    data = Path(__file__).read_bytes()
    assert mutate_bytes(random.Random(7), data) == mutate_bytes(random.Random(7), data) != data
