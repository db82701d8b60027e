"""Forms of tests that leave something open: every kind with the right score, and its neighbours."""

from __future__ import annotations

import json

import pytest

from megatron_r1.rewards.code.cases import TestsError
from megatron_r1.rewards.code.forms import MAX_PRELUDE_CHARACTERS, prelude_without, read_tests
from tests.code_answers import judged, needs_cpp, needs_sandbox


def calls(inputs, outputs, **more):
    return {"fn_name": "f", "inputs": inputs, "outputs": outputs, **more}


WRAPPED = calls([[1], [5]], [[2], [6]])
KEYS = calls([[{"1": 2, "2": 3}]], [5])
HELPERS = {
    "check": "def check(candidate):\n    assert candidate([1, 2]) == 6\n    assert candidate([]) == None\n",
    "entry_point": "f",
    "prelude": "import math\nfrom typing import List\n\ndef helper(x):\n    return 2 * x\n\ndef f(xs: List[int]):\n    '''doc'''\n",
}
CASES = {
    "expected values in lists": ("def f(x): return x + 1", WRAPPED, 1),
    "the same, and they are lists": ("def f(x): return [x + 1]", WRAPPED, 1),
    "the same, and they are tuples": ("def f(x): return (x + 1,)", WRAPPED, 1),
    "now a list and now none": ("def f(x): return [x + 1] if x == 1 else x + 1", WRAPPED, 0),
    "now none and now a list": ("def f(x): return x + 1 if x == 1 else [x + 1]", WRAPPED, 0),
    "a wrong value in lists": ("def f(x): return x", WRAPPED, 0),
    "not every expected value is a list of one": ("def f(x): return x + 1", calls([[1], [5]], [[2], [6, 7]]), 0),
    "not every expected value is a list": ("def f(x): return x + 1", calls([[1], [5]], [[2], 6]), 0),
    "lists in lists": ("def f(x): return [x, x]", calls([[1], [5]], [[[1, 1]], [[5, 5]]]), 1),
    "exact tests": ("def f(x): return x + 1", WRAPPED | {"exact": True}, 0),
    "exact tests of lists": ("def f(x): return [x + 1]", WRAPPED | {"exact": True}, 1),
    "a key that was a number": ("def f(x): return {x: 1}", calls([[3]], [{"3": 1}]), 1),
    "a key that was a number and its text": ("def f(x): return {x: 1, str(x): 1}", calls([[3]], [{"3": 1}]), 0),
    "another key": ("def f(x): return {x + 1: 1}", calls([[3]], [{"3": 1}]), 0),
    "arguments with keys that were numbers": ("def f(d): return d[1] + d[2]", KEYS, 1),
    "arguments with keys that are texts": ("def f(d): return d['1'] + d['2']", KEYS, 1),
    "arguments with keys of which one is a text": ("def f(d): return d[1]", calls([[{"1": 5, "a": 3}]], [5]), 0),
    "keys that were numbers deep in a list": ("def f(g): return g[0][7][1]", calls([[[{"7": [4, 5]}]]], [5]), 1),
    "keys of both sides, and lists": ("def f(d): return {k: v for k, v in d.items() if k > 1}", calls([[{"1": 2, "2": 3}]],
     [[{"2": 3}]]), 1),
    "names of arguments are no keys": ("def f(a): return a", calls([{"a": 3}], [3]), 1),
    "no function": ("print(int(input()) + 1)", {"fn_name": None, "inputs": ["1\n"], "outputs": ["2\n"]}, 1),
    "no function, wrong": ("print(int(input()))", {"fn_name": None, "inputs": ["1\n"], "outputs": ["2\n"]}, 0),
    "lists of lines": ("print(int(input()))\nprint(input())", {"inputs": [["3", "a b"]], "outputs": [["3", "a b"]]}, 1),
    "lists of lines that have their ends": ("print(input() + input())", {"inputs": [["3\n", "a"]], "outputs": [["3a\n"]]}, 1),
    "lists of lines, wrong": ("print(int(input()))", {"inputs": [["3", "a b"]], "outputs": [["3", "a b"]]}, 0),
    "a helper and an import of the prompt": ("def f(xs: List[int]): return helper(sum(xs)) if xs else None", HELPERS, 1),
    "a helper of the prompt replaced": ("def helper(x): return 1\ndef f(xs): return helper(sum(xs))", HELPERS, 0),
    "no function where the prompt has an empty one": ("x = 1", HELPERS, 0),
    "a wrong function beside helpers": ("def f(xs): return 6", HELPERS, 0),
    "a prompt that ends with the function's line": ("def f(xs: List[int]): return helper(sum(xs)) if xs else None",
                                                     HELPERS | {"prelude": HELPERS["prelude"].replace("    '''doc'''\n", "")}, 1),
}  # fmt: skip


@needs_sandbox
@pytest.mark.parametrize("name", CASES)
def test_what_data_leaves_open(name):
    code, tests, score = CASES[name]
    assert judged(code, tests).score == score
    assert judged(code, json.dumps(tests), stop_at_first_failure=True).score == score


@needs_cpp
def test_what_data_leaves_open_holds_for_cpp():
    assert judged("int f(int x) { return x + 1; }", WRAPPED, "cpp").score == 1
    assert judged("int f(int x) { return x; }", WRAPPED, "cpp").score == 0


@pytest.mark.parametrize(
    ("tests", "said"),
    [
        ({"inputs": [["1", 2]], "outputs": ["1"]}, "inputs without fn_name are strings"),
        ({"inputs": ["1"], "outputs": [[["1"]]]}, "outputs without fn_name are strings"),
        ({"inputs": ["1"], "outputs": [None]}, "not NoneType"),
        (calls([1], [1]), "every input is a list of arguments"),
        (calls([[json.loads("[" * 900 + "]" * 900)]], [1]), "nested too deep"),
        (calls([[1]], [json.loads("[" * 900 + "]" * 900)]), "nested too deep"),
        ({"fn_name": "", "inputs": [[1]], "outputs": [1]}, "fn_name '' is not a name"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": []}, "limits is an object"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": {"memory": 3}}, "limits.memory is unknown"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": {"memory_mb": "3"}}, "limits.memory_mb is a number above 0"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": {"cpu_seconds": True}}, "limits.cpu_seconds is a number above 0"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": {"cpu_seconds": float("nan")}}, "limits.cpu_seconds is a number above 0"),
        ({"inputs": ["1"], "outputs": ["1"], "limits": {"cpu_seconds": 0}}, "limits.cpu_seconds is a number above 0"),
        ({"inputs": ["1"], "outputs": ["1"], "checker": "def check(a, b): pass"}, "checker defines no function check"),
        ({"inputs": ["1"], "outputs": ["1"], "checker": "def check(a, b, c) pass"}, "checker is not Python"),
        ({"inputs": ["1"], "outputs": ["1"], "checker": ["x"]}, "checker is Python"),
        ({"asserts": ["assert f() == 1"], "checker": "def check(a, b, c): return True"}, "with inputs and outputs only"),
        (HELPERS | {"prelude": "#" * (MAX_PRELUDE_CHARACTERS + 1)}, "prelude is longer"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_unusable_forms_are_refused_by_name(tests, said):
    with pytest.raises(TestsError, match=said) as caught:
        read_tests(tests)
    assert "\n" not in str(caught.value)


def test_what_a_prompt_gives_is_without_the_function():
    assert prelude_without(HELPERS["prelude"], "f") == "import math\nfrom typing import List\n\ndef helper(x):\n    return 2 * x"
    assert prelude_without("Write a function.", "f") == ""


@pytest.mark.parametrize("depth", [3000, 50_000])
def test_tests_that_are_nested_too_deep_are_refused(depth):
    deep = "+".join(["1"] * depth)
    for tests in (
        [f"assert f({deep}) == 1"],
        [f"assert f(1) == ({deep}) and f(2)"],
        {"functional": f"def check(c):\n    assert c({deep})\ncheck(f)"},
        {"check": f"def check(c):\n    assert c(1) == {deep}", "entry_point": "f"},
    ):
        with pytest.raises(TestsError):
            read_tests(tests)
