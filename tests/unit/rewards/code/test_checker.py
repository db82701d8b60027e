"""Special judges: a checker decides, its own failures are not the program's, and a program cannot speak for it."""

from __future__ import annotations

import pytest

from megatron_r1.rewards.code.cases import TestsError
from megatron_r1.rewards.code.checker import MAX_CHECKER_CHARACTERS, check_checker
from tests.attack_programs import read_programs
from tests.code_answers import judged, needs_cpp, needs_sandbox

ONE_OF_TWO = """
def check(input, output, expected):
    return int(output) in map(int, input.split())
"""
SAME_ITEMS = "def check(input, output, expected):\n    return sorted(output) == sorted(expected)"
CHEATS = read_programs("checker_cheats.txt")


def stdio(checker, outputs=("2\n", "8\n")):
    return {"inputs": ["2 5\n", "8 9\n"], "outputs": list(outputs), "checker": checker}


CASES = {
    "the expected answer": ("print(input().split()[0])", stdio(ONE_OF_TWO), "correct"),
    "another right answer": ("print(input().split()[1])", stdio(ONE_OF_TWO), "correct"),
    "now the one, now the other": ("x = input().split()\nprint(x[0] if x[0] == '2' else x[1])", stdio(ONE_OF_TWO), "correct"),
    "the same without a checker": ("print(input().split()[1])", {**stdio(ONE_OF_TWO), "checker": None}, "wrong"),
    "a wrong answer": ("print(7)", stdio(ONE_OF_TWO), "wrong"),
    "right in one test": ("print(5)", stdio(ONE_OF_TWO), "wrong"),
    "no number": ("print('five')", stdio(ONE_OF_TWO), "wrong"),
    "no output": ("pass", stdio(ONE_OF_TWO), "wrong"),
    "a program that fails": ("print(5)\n1 / 0", stdio(ONE_OF_TWO), "wrong"),
    "no expected answer in the data": ("print(input().split()[1])", stdio(ONE_OF_TWO, (None, None)), "correct"),
    "bytes that are no text": ("import sys\nsys.stdout.buffer.write(b'\\xff\\xfe')", stdio(ONE_OF_TWO), "wrong"),
    "a function": ("def f(n): return [n, n - 1]", {"fn_name": "f", "inputs": [[3]], "outputs": [[2, 3]],
     "checker": SAME_ITEMS}, "correct"),
    "a function, wrong": ("def f(n): return [n, n]", {"fn_name": "f", "inputs": [[3]], "outputs": [[2, 3]],
     "checker": SAME_ITEMS}, "wrong"),
    "a function's arguments": ("def f(a, b): return b", {"fn_name": "f", "inputs": [[3, 4], {"a": 5, "b": 6}],
     "outputs": [None, None],
                                "checker": "def check(i, o, e): return (i, o) in (([3, 4], 4), ({'a': 5, 'b': 6}, 6))"},
                                 "correct"),
    "a function without data": ("class A: pass\ndef f(n): return A()", {"fn_name": "f", "inputs": [[3]], "outputs": [None],
                                 "checker": "def check(i, o, e): return True"}, "wrong"),
    # the checker's own failures
    "it always crashes": ("print(2)", stdio("def check(i, o, e): return 1 / 0"), "error"),
    "it cannot be imported": ("print(2)", stdio("import no_such_module\ndef check(i, o, e): return True"), "error"),
    "it never ends": ("print(2)", stdio("def check(i, o, e):\n    while True: pass"), "timeout"),
    "it takes all memory": ("print(2)", stdio("def check(i, o, e): return bytearray(1 << 40)"), "error"),
    "it ends its process": ("print(2)", stdio("import os\ndef check(i, o, e): os._exit(0)"), "error"),
    "it returns a number": ("print(2)", stdio("def check(i, o, e): return 1"), "error"),
    "it returns nothing": ("print(2)", stdio("def check(i, o, e): pass"), "error"),
    "it prints its verdict": ("print(2)", stdio("def check(i, o, e): print(True)"), "error"),
    "it crashes without an expected answer, but not for others": ("print('x')", stdio(ONE_OF_TWO, (None, None)), "wrong"),
    "it crashes without an expected answer": ("print(2)", stdio("def check(i, o, e): return 1 / 0", (None, None)), "error"),
    "it never ends for this output, and there is no expected one": ("print(7)",
     stdio("def check(i, o, e):\n    while o == '7\\n': pass\n    return True", (None, None)), "wrong"),
    "it fails for a forged value, and there is no expected one": ("def f(x): return 'y'", {"fn_name": "f", "inputs": [[1]],
     "outputs": [None], "checker": "def check(i, o, e): return o + 1 == 3"}, "wrong"),
    "it crashes, and the program is wrong": ("print(9)\nif input() == '8 9': 1 / 0",
     stdio("def check(i, o, e): return 1 / 0"), "wrong"),
    "it crashes for one output only": ("print(7)", stdio("def check(i, o, e):\n    assert o == e\n    return True"), "wrong"),
    "it never ends for one output only": ("print(7)", stdio("def check(i, o, e):\n    while o != e: pass\n    return True"),
     "wrong"),
    "it writes to /tmp": ("print(2)", stdio("def check(i, o, e):\n    open('/tmp/x', 'x').write(o)\n    return True"), "correct"),
    "it prints": ("print(2)", stdio("def check(i, o, e):\n    print(e)\n    return True"), "correct"),
    "it is no checker": ("print(2)", stdio("def judge(i, o, e): return True"), "unscorable"),
    "it is too long": ("print(2)", stdio(ONE_OF_TWO + "#" * MAX_CHECKER_CHARACTERS), "unscorable"),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_a_checker_decides(name):
    code, tests, outcome = CASES[name]
    verdict = judged(code, tests, cpu_seconds=1)
    assert verdict.outcome == outcome, verdict
    assert verdict.detail.isprintable()
    assert outcome not in ("error", "timeout") or "checker" in verdict.detail


@pytest.mark.parametrize(
    "source", ['#include "testlib.h"\nint main(int c, char* v[]) {}', "# include <cstdio>\n", "int main () {}"]
)
def test_a_checker_in_cpp_is_refused_by_name(source):
    with pytest.raises(TestsError, match=r"^tests: checker is C\+\+; only Python that defines check\(input, output, expected\)"):
        check_checker(source)


def test_a_comment_about_includes_is_python():
    assert check_checker("# include <all>\n# int main() of no one\ndef check(a, b, c): return True")


@needs_cpp
def test_a_checker_judges_cpp_as_well():
    assert (
        judged("#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << b; }", stdio(ONE_OF_TWO), "cpp").score
        == 1
    )
    tests = {"fn_name": "f", "inputs": [[3]], "outputs": [[2, 3]], "checker": SAME_ITEMS}
    assert judged("vector<int> f(int n) { return {n, n - 1}; }", tests, "cpp").score == 1


@needs_sandbox
def test_a_failure_of_the_checker_leaves_out_only_what_it_judges():
    checker = "def check(i, o, e):\n    return True if i.startswith('2') else 1 / 0"
    verdict = judged("print(2)", stdio(checker), partial_credit=True)
    assert (verdict.score, verdict.outcome, verdict.parts["tests"]) == (None, "error", ["accepted", "checker_error"])
    assert judged("print(2)", stdio(checker), stop_at_first_failure=True).outcome == "error"


SECRET_CHECKER = """
SECRET = 'R1EXPECTED'
def check(input, output, expected):
    return output.strip() == SECRET and expected == SECRET
"""


@needs_sandbox
@pytest.mark.parametrize("name", CHEATS)
def test_a_program_cannot_speak_for_the_checker(name):
    source = CHEATS[name][1]
    if source.startswith("# function"):
        tests = {"fn_name": "f", "inputs": [[1], [2]], "outputs": ["R1EXPECTED"] * 2, "checker": SECRET_CHECKER}
    else:
        tests = {"inputs": ["1\n", "2\n"], "outputs": ["R1EXPECTED"] * 2, "checker": SECRET_CHECKER}
    verdict = judged(source, tests, cpu_seconds=2)
    assert (verdict.outcome, verdict.score) == ("wrong", 0), verdict
    assert "accepted" not in verdict.parts["counts"] and "R1EXPECTED" not in verdict.detail


@needs_sandbox
def test_the_same_checker_accepts_the_right_answer():
    assert judged("print('R1' + 'EXPECTED')", {"inputs": ["1"], "outputs": ["R1EXPECTED"], "checker": SECRET_CHECKER}).score == 1
