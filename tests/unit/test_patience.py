"""Limits by the clock follow the load of the machine, in every test."""

from __future__ import annotations

import ast
import time
from collections.abc import Iterator

import pytest

from tests import patience
from tests.paths import ROOT
from tests.patience import patient, slowness, wait_until

FILES = sorted((ROOT / "tests").rglob("*.py"))
CLOCKS = {"time.monotonic()", "time.perf_counter()"}
WAITING = {"communicate", "wait", "run", "check_output", "check_call"}


@pytest.fixture
def factors(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What measurements give, one after the other; the last one stays."""
    given: list[float] = []
    monkeypatch.setattr(patience, "slowness", lambda: given.pop(0) if len(given) > 1 else given[0])
    return given


def test_a_machine_is_never_faster_than_an_idle_one() -> None:
    assert slowness() >= 1.0 and patient(3.0) >= 3.0


def test_waiting_ends_with_the_event(factors: list[float]) -> None:
    factors += [1.0]
    answers = iter([False, False, True])
    wait_until(lambda: next(answers), 60, pause=0.0)


def test_waiting_gives_up_where_the_machine_is_as_slow_as_it_was(factors: list[float]) -> None:
    factors += [2.0]
    started = time.monotonic()
    with pytest.raises(AssertionError, match=r"no bus in 0 s, times 2\.0 for the load of this machine"):
        wait_until(lambda: False, 0.05, "bus")
    assert time.monotonic() - started >= 0.1


def test_waiting_goes_on_where_the_machine_became_slower_meanwhile(factors: list[float]) -> None:
    factors += [1.0, 1e6, 1e6]
    started = time.monotonic()
    wait_until(lambda: time.monotonic() - started > 0.1, 0.01)


def fixed_limits(tree: ast.Module) -> Iterator[int]:
    """Lines that wait for a process with a number of seconds, or until a number of seconds from now."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in WAITING:
            limits = [keyword.value for keyword in node.keywords if keyword.arg == "timeout"]
            yield from (limit.lineno for limit in limits if isinstance(limit, ast.Constant))
        if isinstance(node, ast.BinOp) and isinstance(node.right, ast.Constant) and ast.unparse(node.left) in CLOCKS:
            yield node.lineno


def test_no_test_waits_for_a_fixed_time() -> None:
    found = {str(path.relative_to(ROOT)): list(fixed_limits(ast.parse(path.read_text(encoding="utf-8")))) for path in FILES}
    fixed = {path: lines for path, lines in found.items() if lines}
    assert not fixed, "take patient(seconds) or wait_until of tests/patience.py"


@pytest.mark.parametrize(
    "code", ["subprocess.run([], timeout=3)", "process.communicate(timeout=3.5)", "deadline = time.monotonic() + 20"]
)
def test_a_fixed_time_is_found(code: str) -> None:
    assert list(fixed_limits(ast.parse(code))) == [1]
