"""Limits: those of the settings, those that a problem asks for, and the most that it gets."""

from __future__ import annotations

import math

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.rewards.code.cases import TestsError
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.code.limits import MOST, ProblemLimits, limits_of, sandbox_limits
from megatron_r1.rewards.code.scorer import CodeScorer
from tests.code_answers import judged, needs_cpp, needs_sandbox

NUMBERS = "\n".join(map(str, range(300_000)))
PRINTS = "print('\\n'.join(map(str, range(int(input())))))"
DEEP = "def f(n): return 0 if n == 0 else 1 + f(n - 1)"
DEEP_CPP = """#include <iostream>
int f(int n, volatile char* above) {
    volatile char here[64]; here[n & 63] = *above; return n == 0 ? 0 : here[n & 63] + f(n - 1, here + (n & 63)); }
int main() { int n; std::cin >> n; volatile char one = 1; std::cout << f(n, &one); }"""


def stdio(given, expected, **limits):
    return {"inputs": [str(given)], "outputs": [str(expected)], **({"limits": limits} if limits else {})}


def busy(seconds):
    return f"import time\nwhile time.process_time() < {seconds}: pass\nprint(1)"


CASES = {
    "output of 2 MB that is expected": (PRINTS, stdio(300_000, NUMBERS), 1),
    "output of 2 MB that is not": (PRINTS, stdio(300_000, "1"), 0),
    "output of 2 MB that differs at the end": (PRINTS, stdio(300_000, f"{NUMBERS}0"), 0),
    "a result of 2 MB": ("def f(n): return list(range(n))", {"fn_name": "f", "inputs": [[300_000]],
     "outputs": [list(range(300_000))]}, 1),
    "a text of 3 MB": ("def f(n): return 'x' * n", {"fn_name": "f", "inputs": [[3_000_000]], "outputs": ["x" * 3_000_000]}, 1),
    "output beside what is expected": ("print('x' * (3 << 20))\nprint(1)", stdio("", "1"), 0),
    "recursion of a function": (DEEP, {"fn_name": "f", "inputs": [[20_000]], "outputs": [20_000]}, 1),
    "recursion of a method": ("class Solution:\n    def f(self, n): return 0 if n == 0 else 1 + self.f(n - 1)",
                              {"fn_name": "f", "inputs": [[20_000]], "outputs": [20_000]}, 1),
    "recursion of a program": (f"{DEEP}\nprint(f(int(input())))", stdio(20_000, 20_000), 1),
    "recursion with a cache": (f"from functools import *\n@cache\n{DEEP}\nprint(f(int(input())))", stdio(20_000, 20_000), 1),
    "recursion beyond the depth": (f"{DEEP}\nprint(f(int(input())))", stdio(100_000, 100_000), 0),
    "a problem of great depth": (f"{DEEP}\nprint(f(int(input())))", stdio(100_000, 100_000, recursion_depth=200_000), 1),
    "a problem of little depth": (f"{DEEP}\nprint(f(int(input())))", stdio(20_000, 20_000, recursion_depth=1000), 0),
    "a program that sets its depth": (f"import sys\nsys.setrecursionlimit(10**6)\n{DEEP}\nprint(f(int(input())))",
     stdio(100_000, 100_000), 1),
    "recursion without end": ("def f(n): return f(n + 1)\nprint(f(0))", stdio(1, 1), 0),
    "memory that the problem allows": ("x = bytearray(900 << 20)\nprint(1)", stdio("", 1, memory_mb=1024), 1),
    "memory that it does not": ("x = bytearray(900 << 20)\nprint(1)", stdio("", 1), 0),
    "memory that no problem gets": ("x = bytearray(3 << 30)\nprint(1)", stdio("", 1, memory_mb=1e9), 0),
    "a problem with little memory": ("x = bytearray(200 << 20)\nprint(1)", stdio("", 1, memory_mb=128), 0),
    "a problem with little time": (busy(2), stdio("", 1, cpu_seconds=1), 0),
    "a problem with more time": (busy(2), stdio("", 1, cpu_seconds=10), 1),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_what_a_program_may_take(name):
    code, tests, score = CASES[name]
    assert judged(code, tests, **({"cpu_seconds": 1} if name == "a problem with more time" else {"cpu_seconds": 8})).score == score


@needs_cpp
@pytest.mark.parametrize(
    ("depth", "limits", "verdict"),
    [(1_000_000, {}, "accepted"), (1_000_000, {"stack_mb": 16}, "runtime_error"), (100_000_000, {}, "runtime_error")],
)
def test_the_stack_of_a_cpp_program(depth, limits, verdict):
    assert judged(DEEP_CPP, stdio(depth, depth, **limits), "cpp", cpu_seconds=8).parts["tests"] == [verdict]


THREADS = 16  #: all alive at once: each waits for the others, and allocates
THREADS_CPP = f"""#include <condition_variable>
#include <iostream>
#include <mutex>
#include <thread>
#include <vector>
std::mutex held; std::condition_variable changed; int arrived = 0;
void meet() {{
    std::vector<int> own(1000, 1); std::unique_lock<std::mutex> lock(held); arrived += own[7]; changed.notify_all();
    changed.wait(lock, [] {{ return arrived == {THREADS}; }}); }}
int main() {{
    std::vector<std::thread> all;
    for (int i = 0; i < {THREADS}; ++i) all.emplace_back(meet);
    for (auto& one : all) one.join();
    std::cout << arrived; }}"""
THREADS_PYTHON = f"""import threading
meeting = threading.Barrier({THREADS})
def meet():
    own = bytearray(100_000)
    meeting.wait()
all_of_them = [threading.Thread(target=meet) for _ in range({THREADS})]
for one in all_of_them: one.start()
for one in all_of_them: one.join()
"""


@needs_cpp
def test_threads_of_a_cpp_program_fit_in_its_memory():
    assert judged(THREADS_CPP, stdio("", THREADS), "cpp").score == 1


@needs_sandbox
def test_threads_of_a_python_program_fit_in_its_memory():
    assert judged(f"{THREADS_PYTHON}print({THREADS})", stdio("", THREADS)).score == 1
    called = f"def f(n):\n    exec({THREADS_PYTHON!r}, {{}})\n    return n"
    assert judged(called, {"fn_name": "f", "inputs": [[THREADS]], "outputs": [THREADS]}).score == 1


@needs_sandbox
def test_a_python_program_chooses_the_stack_of_its_threads():
    code = f"import threading\nprint(threading.stack_size(64 << 20) >> 20)\n{THREADS_PYTHON.replace(str(THREADS), '2')}"
    assert judged(code, stdio("", 8)).score == 1


def test_a_problem_gets_what_it_asks_for_up_to_a_bound():
    defaults = ProblemLimits(cpu_seconds=30)

    def limits(**asked):
        return limits_of(read_tests(stdio("", 1, **asked)), defaults, MOST)

    assert limits() == defaults
    assert limits(cpu_seconds=10).cpu_seconds == 10 and limits(cpu_seconds=10).wall_seconds == 30
    assert limits(cpu_seconds=99) == ProblemLimits(cpu_seconds=30, wall_seconds=60)  # the setting is above the bound
    asked = dict.fromkeys(("cpu_seconds", "wall_seconds", "memory_mb", "output_mb", "stack_mb", "recursion_depth"), 1e11)
    assert limits(**asked) == ProblemLimits(**vars(MOST) | {"cpu_seconds": 30})
    assert limits(memory_mb=64, output_mb=0.5) == ProblemLimits(cpu_seconds=30, memory_mb=64, output_mb=0.5)
    small = limits(memory_mb=4, stack_mb=1, recursion_depth=1)
    assert [sandbox_limits(small, language).memory_bytes >> 20 for language in ("cpp", "python")] == [4, 32]
    assert sandbox_limits(small, "cpp").stack_bytes == 1 << 20 and sandbox_limits(small, "python").recursion_depth == 50


def test_room_for_the_expected_output_says_little_of_it():
    sizes = {
        limits_of(read_tests(stdio("", "x" * size)), ProblemLimits(), MOST).output_mb for size in range(600_000, 1_000_000, 50_000)
    }
    assert sizes == {2.0}
    assert limits_of(read_tests(stdio("", "x" * 100_000_000)), ProblemLimits(), MOST).output_mb == MOST.output_mb


@needs_sandbox
def test_limits_that_cannot_be_are_refused():
    names = ("cpu_seconds", "wall_seconds", "memory_mb", "output_mb", "stack_mb", "recursion_depth")
    for value in (0, -1, math.nan, math.inf, -math.inf, 1e300, 1e-300, True, "5", None):
        for settings in [{name: value} for name in names] + [{"most": {name: value}} for name in names]:
            with pytest.raises(ConfigError, match=r"^reward\.code\.(most\.)?\w+=.* is no limit for a program"):
                CodeScorer(**settings)
        for name in names:
            if value != 1e300:  # a problem gets no more than `most`
                with pytest.raises(TestsError, match=rf"^tests: limits\.{name}\b[^\n]*$"):
                    read_tests(stdio("", 1, **{name: value}))
    for settings in ({"program_seconds": 0}, {"program_seconds": math.nan}, {"float_tolerance": -1}, {"most": {"cpu": 1}}):
        with pytest.raises(ConfigError, match=rf"^reward\.code\.{next(iter(settings))}"):
            CodeScorer(**settings)
    with pytest.raises(ConfigError, match="partial_credit needs all tests"):
        CodeScorer(partial_credit=True, stop_at_first_failure=True)


@needs_sandbox
def test_partial_credit_is_the_share_of_tests_and_no_outcome():
    tests = {"inputs": ["1", "2", "3", "4"], "outputs": ["1", "2", "3", "5"]}
    assert (judged("print(input())", tests).score, judged("print(input())", tests, partial_credit=True).score) == (0, 0.75)
    assert judged("print(input())", tests, partial_credit=True).outcome == "wrong"
    assert judged("print(input() if", tests, partial_credit=True).score == 0
    whole = judged("print(5 if (x := input()) == '4' else x)", tests, partial_credit=True)
    assert (whole.score, whole.outcome) == (1, "correct")
