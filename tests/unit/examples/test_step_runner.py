"""Steps of the examples run once, in order or side by side, and what ends this process ends them."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from examples import step_runner
from megatron_r1.errors import ConfigError
from tests.paths import ROOT
from tests.patience import patient


def test_steps_that_are_done_are_not_done_again_and_a_stopped_one_is(tmp_path: Path) -> None:
    log = tmp_path / "log"

    def step(name: str, more: str = "") -> list[str]:
        return [sys.executable, "-c", f"open({str(log)!r}, 'a').write('{name} '){more}"]

    steps = {"one": step("one"), "two": step("two", "; raise SystemExit(3)"), "three": step("three")}
    assert step_runner.run_steps(steps, tmp_path) == 3
    steps["two"] = step("two")
    assert step_runner.run_steps(steps, tmp_path) == 0
    assert step_runner.run_steps(steps | {"one": step("other")}, tmp_path) == 0
    assert log.read_text().split() == ["one", "two", "two", "three", "other"]
    assert [(a["step"], a["code"]) for a in step_runner.read_attempts(tmp_path)][:3] == [("one", 0), ("two", 3), ("two", 0)]
    costs = step_runner.cost_table(["two"], tmp_path)
    assert re.search(r"^\| two +\| +\d+ \| +0\.\d+ \| +2 \|$", costs, flags=re.MULTILINE)


def test_two_run_side_by_side_where_they_may_and_never_beside_another(tmp_path: Path) -> None:
    def meets(name: str, other: str) -> list[str]:  # ends only when the other one has begun, and the first one is over
        return ["sh", "-c", f"cd {tmp_path}; [ -e begun ] || exit 1; : > {name}; while [ ! -e {other} ]; do sleep 0.01; done"]

    first = ["sh", "-c", f"sleep 0.2; : > {tmp_path}/begun"]
    last = ["sh", "-c", f'cd {tmp_path}; [ -e begun ] && [ $(grep -c \'"step": "side\' {step_runner.STEPS}) = 2 ]']
    steps = {"first": first, "side a": meets("a", "b"), "side b": meets("b", "a"), "last": last}
    assert step_runner.run_steps(steps, tmp_path, side_by_side=["side a", "side b"]) == 0
    names = [attempt["step"] for attempt in step_runner.read_attempts(tmp_path)]
    assert names[0] == "first" and set(names[1:3]) == {"side a", "side b"} and names[3:] == ["last"]


def test_a_step_beside_a_failed_one_is_asked_to_end_and_later_ones_do_not_begin(
    tmp_path: Path, capfd: pytest.CaptureFixture
) -> None:
    steps = {"bad": ["sh", "-c", "exit 4"], "long": ["sleep", "600"], "later": ["sh", "-c", f": > {tmp_path}/later"]}
    assert step_runner.run_steps(steps, tmp_path, side_by_side=list(steps)) == 4
    assert [(a["step"], a["code"]) for a in step_runner.read_attempts(tmp_path)] == [("bad", 4), ("long", None)]
    assert "bad ended with code 4; the same command goes on" in capfd.readouterr().err and not (tmp_path / "later").exists()


def test_a_request_to_end_goes_on_to_the_step_and_is_kept(tmp_path: Path) -> None:
    waits = "import signal, time, sys; signal.signal(15, lambda *_: sys.exit(7)); open('there', 'w'); time.sleep(600)"
    driver = (
        "import sys; from pathlib import Path; from examples import step_runner as r; r.ROOT = Path(sys.argv[1]); "
        f"run = lambda: r.run_steps({{'waits': [sys.executable, '-c', {waits!r}]}}, Path(sys.argv[1])); "
        "sys.exit(r.run_example(run, lambda: 'never'))"
    )
    process = subprocess.Popen([sys.executable, "-c", driver, str(tmp_path)], cwd=ROOT)
    end = time.monotonic() + patient(60)
    while not (tmp_path / "there").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=patient(60)) == 128 + signal.SIGTERM
    assert [(a["step"], a["code"]) for a in step_runner.read_attempts(tmp_path)] == [("waits", None)]


def test_the_handler_of_before_is_back_however_it_ends(capsys) -> None:
    def fails() -> int:
        raise ConfigError("no such text")

    before = signal.getsignal(signal.SIGTERM)
    for run, code in ((lambda: 0, 0), (lambda: 7, 7), (fails, 2)):
        assert step_runner.run_example(run, lambda: "the result") == code
        assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out == "\nthe result\n", "of the one that ended well"
