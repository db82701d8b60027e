"""Reads the tests of a coding problem from the forms in which data sets give them.

Forms that `read_tests` takes (JSON objects; or a string with such JSON):
    {"inputs": [str, ...], "outputs": [str, ...]}                        a program: standard input, expected output
    {"inputs": [[arg, ...], ...], "outputs": [...], "fn_name": "f"}      a function, or a method of class Solution (APPS, LeetCode)
    {"functional": "def check(candidate): ...", "check(Solution().f)"}   LeetCode-style asserts (rllm)
    {"asserts": ["assert f(1) == 2", ...], "setup": "..."}               MBPP; a bare list of such strings likewise
    {"check": "def check(candidate): ...", "entry_point": "f", "prelude": "..."}   HumanEval; prelude: the prompt with its helpers

Asserts are taken apart (`asserts.py`): of `assert f(args) == value` only `f(args)` ever enters the sandbox of the program.
An answer in C++ is called with the same arguments in all forms of function tests (`cpp_source.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_r1.rewards.code.asserts import tests_of_asserts, tests_of_check, tests_of_leetcode
from megatron_r1.rewards.code.cases import CallTest, StdioTest, Suite, TestsError
from megatron_r1.rewards.sandbox.values import encode_value

MAX_TESTS = 10_000


def read_tests(reference: Any) -> Suite:
    """Read one of the forms above.

    Raises:
        TestsError: it is none of them, or has no test.
    """
    if isinstance(reference, str):
        try:
            reference = json.loads(reference)
        except (ValueError, RecursionError) as error:
            raise TestsError("the tests are a string that is not JSON") from error
    if isinstance(reference, list):
        reference = {"asserts": reference}
    if not isinstance(reference, Mapping):
        raise TestsError(f"tests are an object or a list of asserts, not {type(reference).__name__}")
    if "functional" in reference:
        suite = Suite(tests_of_leetcode(_text(reference, "functional")), leetcode_prelude(), leetcode_modules())
    elif "asserts" in reference:
        suite = Suite(tests_of_asserts(_texts(reference, "asserts"), _text(reference, "setup", "")))
    elif "check" in reference:
        parts = (_text(reference, name) for name in ("check", "entry_point"))
        suite = Suite(tests_of_check(*parts, prelude=_text(reference, "prelude", "")))
    elif "inputs" in reference and "outputs" in reference:
        suite = _pairs(reference)
    else:
        raise TestsError("tests have none of the keys inputs and outputs, functional, asserts, check")
    if not 0 < len(suite.tests) <= MAX_TESTS:
        raise TestsError(f"{len(suite.tests)} usable tests")
    return suite


@cache
def leetcode_prelude() -> str:
    """Source of what LeetCode provides."""
    return Path(__file__).with_name("leetcode_prelude.py").read_text(encoding="utf-8")


@cache
def leetcode_modules() -> dict[str, bytes]:
    """The package that LeetCode offers beside Python's own, as files: untrusted code may not see where it is installed."""
    package = resources.files("sortedcontainers")
    return {f"{package.name}/{file.name}": file.read_bytes() for file in package.iterdir() if file.name.endswith(".py")}


def find_function(name: str) -> str:
    """An expression for a function, or a method of class Solution, of that name."""
    if not name.isidentifier():
        raise TestsError(f"fn_name {name!r} is not a name")
    return f"({name} if {name!r} in globals() else Solution().{name})"


def _pairs(reference: Mapping[str, Any]) -> Suite:
    inputs, outputs = reference["inputs"], reference["outputs"]
    if not isinstance(inputs, list) or not isinstance(outputs, list) or len(inputs) != len(outputs):
        raise TestsError("inputs and outputs are two lists of the same length")
    if "fn_name" not in reference:
        if not all(isinstance(text, str) for text in (*inputs, *outputs)):
            raise TestsError("inputs and outputs without fn_name are strings: what a program reads and prints")
        pairs = zip(inputs, outputs, strict=True)
        return Suite(tuple(StdioTest(a.encode(errors="replace"), b.encode(errors="replace")) for a, b in pairs))
    function = find_function(_text(reference, "fn_name"))
    tests = []
    for given, expected in zip(inputs, outputs, strict=True):
        positional, named = ([], given) if isinstance(given, dict) else (given, {})
        if not isinstance(positional, list):
            raise TestsError("with fn_name, every input is a list of arguments or an object of named ones")
        tests.append(CallTest(function, expected, arguments=(encode_value(positional), encode_value(named)), strict=False))
    return Suite(tuple(tests), leetcode_prelude(), leetcode_modules())


def _text(reference: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = reference.get(key, default)
    if not isinstance(value, str):
        raise TestsError(f"tests: {key} is a string, not {type(value).__name__}")
    return value


def _texts(reference: Mapping[str, Any], key: str) -> list[str]:
    value = reference[key]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TestsError(f"tests: {key} is a list of strings")
    return value
