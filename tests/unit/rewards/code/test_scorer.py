"""The code reward: every verdict, every form of tests, and what counts as the same output."""

from __future__ import annotations

import json

import pytest

from benchmarks.rewards_code import tasks_of
from megatron_r1.rewards.code.cases import CallTest, CheckTest, TestsError
from megatron_r1.rewards.code.compare import BinaryTree, LinkedList, agrees, is_true, output_agrees
from megatron_r1.rewards.code.extract import find_code
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.sandbox.probe import probe_sandbox
from megatron_r1.rewards.sandbox.supervisor import SandboxSettings
from megatron_r1.rewards.sandbox.values import encode_value
from tests.patience import patient
from tests.public_data import public_file

PROBE = probe_sandbox(SandboxSettings())
needs_sandbox = pytest.mark.skipif(not PROBE.available, reason=PROBE.reason)
ADD = {"inputs": ["1 2\n", "3 4\n"], "outputs": ["3\n", "7"]}


def verdict_on(code, tests, language="", **settings):
    return CodeScorer(**{"wall_seconds": patient(60), **settings}).score(
        f"<think>hm</think>\n```{language}\n{code}\n```\nDone.", tests
    )


@needs_sandbox
@pytest.mark.parametrize(
    ("language", "code", "verdicts"),
    [
        ("python", "a, b = map(int, input().split())\nprint(a + b)", ["accepted", "accepted"]),
        ("python", "print(3)", ["accepted", "wrong"]),
        ("python", "a, b = input().split()\nprint(int(a) + int(b)) if a == '1' else 1 / 0", ["accepted", "runtime_error"]),
        ("python", "if input() == '1 2': print(3)\nelse:\n    while True: pass", ["accepted", "time_limit"]),
        ("python", "x = bytearray(1 << 32)", ["memory_limit", "memory_limit"]),
        ("python", "print('3' * (1 << 21))", ["output_limit", "output_limit"]),
        ("python", "print(3", ["compile_error", "compile_error"]),
        ("python", "import sys\nprint(sum(map(int, sys.stdin.read().split())))\nexit(0)", ["accepted", "accepted"]),
        ("cpp", "#include <iostream>\nint main() { int a, b; std::cin >> a >> b; std::cout << a + b; }", ["accepted", "accepted"]),
        ("cpp", '#include <cstdio>\nint main() { int a; scanf("%d", &a); puts("3"); return a > 1; }',
         ["accepted", "runtime_error"]),
        ("cpp", "int main() { return x; }", ["compile_error", "compile_error"]),
    ],
)  # fmt: skip
def test_every_test_has_its_verdict(language, code, verdicts):
    verdict = verdict_on(code, ADD, language, cpu_seconds=1)
    assert verdict.parts["tests"] == verdicts
    right = verdicts == ["accepted"] * 2
    assert (verdict.outcome, verdict.score) == (("correct", 1.0) if right else ("wrong", 0.0))
    assert right or next(name for name in verdicts if name != "accepted") in verdict.detail


FORMS = {
    "a method, by JSON": (
        "class Solution:\n    def f(self, a, b=1): return (a, [b])",
        {"fn_name": "f", "inputs": [[1, 2], {"a": 3}], "outputs": [[1, [2]], [3, [1]]]},
        ["accepted", "accepted"],
    ),
    "a function, by JSON": (
        "def f(a): return {str(a): None}",
        {"fn_name": "f", "inputs": [[1], [2]], "outputs": [{"1": None}, {"3": None}]},
        ["accepted", "wrong"],
    ),
    "asserts": (
        "def f(a): return [a]",
        ["assert f(1) == [1]", "assert f(2) == (2,)", "assert f(3) is not None", "assert not f(0)"],
        ["accepted", "wrong", "accepted", "wrong"],
    ),
    "names of the program's and of Python's": (
        "class Pair:\n    def __init__(self, a): self.a = a\ndef sum(p, q): return p.a + q.a",
        ["assert sum(Pair(1), Pair(2)) == 3", "assert sum(Pair(1), Pair(2)) == 4"],
        ["accepted", "wrong"],
    ),
    "large and inexact numbers": (
        "def f(a): return 2**a",
        ["assert f(100) == 1267650600228229401496703205376", "assert abs(f(0.5) - 1.4142) < 1e-4"],
        ["accepted", "accepted"],
    ),
    "set-up with the program's class": (
        "class Node:\n    def __init__(self, v): self.v = v\ndef f(n): return n.v",
        {"asserts": ["assert f(n) == 5"], "setup": "n = Node(5)"},
        ["accepted"],
    ),
    "linked lists": (
        "class Solution:\n    def rest(self, head): return head.next",
        {
            "functional": "def check(candidate):\n"
            "    assert is_same_list(candidate(head=list_node([1, 2])), list_node([2]))\n"
            "    assert is_same_list(candidate(head=list_node([1])), list_node([]))\n"
            "    assert is_same_list(candidate(head=list_node([1, 2])), list_node([2, 3]))\n\n"
            "check(Solution().rest)"
        },
        ["accepted", "accepted", "wrong"],
    ),
    "trees": (
        "class Solution:\n    def flip(self, root: Optional[TreeNode]): return TreeNode(root.val, root.right, root.left)",
        {
            "functional": "def check(candidate):\n"
            "    assert is_same_tree(candidate(root=tree_node([1, None, 2, 3])), tree_node([1, 2, None, 3]))\n\n"
            "check(Solution().flip)"
        },
        ["accepted"],
    ),
    "the package that LeetCode has": (
        "from sortedcontainers import SortedList\nclass Solution:\n    def f(self, a): return list(SortedList(a))",
        {"fn_name": "f", "inputs": [[[3, 1, 2]]], "outputs": [[1, 2, 3]]},
        ["accepted"],
    ),
    "a check with its own reference": (
        "def f(x): return helper(x)\ndef helper(x): return x * 2",
        {
            "check": "def check(c):\n    assert c(1) == 2\n    for i in range(5):\n        assert c(i) == twice(i)",
            "entry_point": "f",
            "prelude": "def twice(x): return 2 * x\ndef f(x):\n    'doc'",
        },
        ["accepted", "accepted"],
    ),
    "a check that fails later": (
        "def f(x): return x * 2 if x < 4 else 0",
        {"check": "def check(c):\n    for i in range(5):\n        assert c(i) == 2 * i", "entry_point": "f"},
        ["wrong"],
    ),
    "a check whose call fails": (
        "def f(x): return x / (x - 3)",
        {"check": "def check(c):\n    for i in range(5):\n        assert c(i) != 7.5", "entry_point": "f"},
        ["runtime_error"],
    ),
}


@needs_sandbox
@pytest.mark.parametrize("form", FORMS)
def test_forms_of_function_tests(form):
    code, tests, verdicts = FORMS[form]
    assert verdict_on(code, tests).parts["tests"] == verdicts


@needs_sandbox
def test_tests_may_be_a_string_of_json():
    assert verdict_on("def f(x): return x", '["assert f(1) == 1"]').outcome == "correct"


@needs_sandbox
def test_a_check_that_never_calls_is_the_datas_failure():
    verdict = verdict_on(
        "def f(x): return x", {"check": "def check(c):\n    assert undefined_name\n    assert c(1)  + 1", "entry_point": "f"}
    )
    assert (verdict.outcome, verdict.score) == ("unscorable", None) and "NameError" in verdict.detail


@needs_sandbox
def test_stopping_early_and_the_time_of_a_program():
    tests = ["assert f(1) == 2"] * 3
    assert verdict_on("def f(x): return x", tests, stop_at_first_failure=True).parts["tests"] == ["wrong", "not_run", "not_run"]
    slow = verdict_on(f"import time\ndef f(x):\n    time.sleep({patient(0.6)})\n    return 2", tests, program_seconds=patient(0.5))
    assert slow.parts["tests"] == ["accepted", "not_run", "not_run"] and slow.score == 0


@pytest.mark.parametrize(
    "tests",
    [None, 3, "", "[", [], {}, {"inputs": [], "outputs": []}, {"inputs": ["a"], "outputs": []}, {"inputs": [1], "outputs": ["a"]},
     ["assert ("],     ["assert 1 == 1"], {"functional": "x = 1"}, {"check": "def check(): pass", "entry_point": "f"},
     {"check": "def check(c): assert True", "entry_point": "f"},
     {"fn_name": "f; import os", "inputs": [[1]], "outputs": [1]}, {"fn_name": "f", "inputs": [1], "outputs": [1]}, "[" * 100000],
    ids=lambda tests: repr(tests)[:40],
)  # fmt: skip
def test_unusable_tests_are_refused(tests):
    with pytest.raises(TestsError):
        read_tests(tests)


@needs_sandbox
def test_unusable_tests_are_unscorable():
    verdict = verdict_on("print(1)", {"inputs": []})
    assert (verdict.outcome, verdict.score) == ("unscorable", None)


def test_expected_values_stay_apart_from_what_enters_the_sandbox():
    source = "def check(c):\n    assert c(x = 1) == 'secret'\n    assert c(2)\n    y = 3\n    assert c(y) == 'hidden'"
    suite = read_tests({"check": source, "entry_point": "f"})
    first, second, third = suite.tests
    assert (first, second) == (CallTest("f(x=1)", "secret"), CallTest("f(2)", True, truth_only=True))
    assert isinstance(third, CheckTest) and "hidden" in third.source and "secret" not in third.source


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("```python\na\n```\ntext\n```python\nb\n```", ("b\n", "python")),
        ("<think>\n```python\na\n```\n</think> no code", None),
        ("```python\na\n```\n<think>never ends", None),
        ("```python\na\n", None),
        ("```cpp\nint x;\n```\n```text\noutput\n```", ("int x;\n", "cpp")),
        ("```\na\n```", ("a\n", "python")),
        ("  ```C++\n  x\n  ```", ("  x\n", "cpp")),
        ("print(1)", None),
        ("```python\n" + "a" * 300_000 + "\n```", None),
    ],
)
def test_find_code(response, expected):
    code = find_code(response, "python")
    assert (code and (code.text, code.language)) == expected


@pytest.mark.parametrize(
    ("output", "expected", "tolerance", "same"),
    [
        (b"1 2\n3\n", b"1  2 \r\n3", None, True),
        (b"1\n2", b"1 2", None, False),
        (b"1\n\n", b"1", None, True),
        (b"\n1", b"1", None, True),
        (b"", b"1", None, False),
        (b"0.3333", b"0.33333", None, False),
        (b"0.3333", b"0.33333", 1e-4, True),
        (b"1000001", b"1000000.0", 1e-6, True),
        (b"1000001", b"1000000", 1e-6, False),
        (b"1000002", b"1000000.0", 1e-6, False),
        (b"nan", b"1", 1e9, False),
        (b"inf", b"1", 1e9, False),
        (b"1e999", b"1", 1e9, False),
        (b"1_0", b"10", 1.0, False),
        (b"YES", b"yes", None, False),
        (b"\xff", "\ufffd".encode(), None, False),
    ],
)
def test_output_agrees(output, expected, tolerance, same):
    assert output_agrees(output, expected, tolerance) is same


@pytest.mark.parametrize(
    ("value", "expected", "same"),
    [
        (1, True, True), (1.0, 1, True), ("1", 1, False), (None, 0, False), ([], None, False), (2**100, 2**100, True),
        (1j, 1j, True),        ((1, 2), (1, 2), True), ([1, 2], (1, 2), False), ({1, 2}, {2, 1}, True),
        (frozenset({(1, 2)}), {(1, 2)}, True),
        ({1}, {1, 2}, False),
        ({1: [2], "a": (3,)}, {"a": (3,), 1: [2]}, True), ({1: 2}, {1: 3}, False), ({1: 2}, {"1": 2}, False), (b"a", b"a", True),
        (float("nan"), float("nan"), False), (0.1 + 0.2, 0.3, False), (range(3), [0, 1, 2], False), (object(), None, False),
    ],
)  # fmt: skip
def test_agrees_is_pythons_equality(value, expected, same):
    encoded = json.loads(json.dumps(encode_value(value)))
    assert agrees(encoded, expected, strict=True, float_tolerance=None) is same
    assert is_true(encoded) is bool(value)


def test_agrees_with_policies():
    assert agrees({"tuple": [1]}, [1], strict=False, float_tolerance=None)
    assert agrees([0.1 + 0.2, 1], [0.3, 1], strict=True, float_tolerance=1e-9)
    assert not agrees([2], [1], strict=True, float_tolerance=1.0)  # integers stay exact
    assert agrees(None, LinkedList([]), strict=True, float_tolerance=None)
    assert not agrees({"linked_list": [1]}, BinaryTree([1]), strict=True, float_tolerance=None)


@pytest.mark.parametrize(
    "hostile",
    [{"int": []}, {"int": "zz"}, {"set": 3}, {"set": [[]]}, {"dict": [[1]]}, {"complex": "ab"}, {"bytes": 1}, {"a": 1, "b": 2}, {},
     {"tuple": None}],
)  # fmt: skip
def test_agrees_survives_forged_results(hostile):
    for expected in (1, "a", [1], (1,), {1}, {1: 2}, LinkedList([1]), 1j, b"a"):
        assert not agrees(hostile, expected, strict=True, float_tolerance=0.1)


@needs_sandbox
def test_reference_solutions_are_accepted_and_spoilt_ones_rejected():
    """Five of each data set; benchmarks/rewards_code.py judges all."""
    scorer = CodeScorer(wall_seconds=patient(60), stop_at_first_failure=True)
    for task in tasks_of(public_file("code"), 5):
        if task.variant != "operator":
            verdict = scorer.score(f"```python\n{task.program}\n```", task.tests)
            assert verdict.outcome == {"reference": "correct", "result": "wrong"}[task.variant], (task, verdict)
