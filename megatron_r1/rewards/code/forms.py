"""Reads the tests of a coding problem from the forms in which data sets give them.

Forms that `read_tests` takes (JSON objects; or a string with such JSON):
    {"inputs": [str, ...], "outputs": [str, ...]}     a program: standard input, expected output; also as lists of lines (APPS)
    {"inputs": [[arg, ...], ...], "outputs": [...], "fn_name": "f"}      a function, or a method of class Solution (APPS, LeetCode)
    {"functional": "def check(candidate): ...", "check(Solution().f)"}   LeetCode-style asserts (rllm)
    {"asserts": ["assert f(1) == 2", ...], "setup": "..."}               MBPP; a bare list of such strings likewise
    {"check": "def check(candidate): ...", "entry_point": "f", "prelude": "..."}   HumanEval; prelude: the prompt with its helpers
    the fields of the tests as MBPP, HumanEval and APPS publish them: test_list ..., test ..., input_output

Asserts are taken apart (`asserts.py`): of `assert f(args) == value` only `f(args)` ever enters the sandbox of the program.
An answer in C++ is called with the same arguments in all forms of function tests (`cpp_source.py`).

All forms may have `limits` (`limits.py`), the first two also:
    "checker": "def check(input, output, expected): ..."    decides in place of a comparison (`checker.py`); outputs may be null
    "exact": true                                            the values mean what they say, with no other reading

APPS leaves open what its tests of functions mean: an expected [x] can be the value x or a list, and JSON has turned keys that were
whole numbers into texts. Tests in which all outputs, or some arguments, look like this have several readings (`Suite`), and a
program must pass all of them in the same reading.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from megatron_r1.rewards.code.asserts import tests_of_asserts, tests_of_check, tests_of_leetcode
from megatron_r1.rewards.code.cases import CallTest, StdioTest, Suite, TestsError
from megatron_r1.rewards.code.checker import check_checker
from megatron_r1.rewards.code.limits import read_limits
from megatron_r1.rewards.sandbox.values import encode_value

MAX_TESTS = 10_000
MAX_PRELUDE_CHARACTERS = 1 << 20  #: Python of so much text is no prompt, and it is read before every test
_WHOLE_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,30})")


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
    try:
        return _read(reference)
    except RecursionError as error:  # of an expression of Python with thousands of parts, too
        raise TestsError("the tests are nested too deep") from error


def _as_own_form(reference: Mapping[str, Any]) -> Mapping[str, Any]:
    """The tests of a published record in one of the other forms."""
    if "test_list" in reference:
        asserts = [*_texts(reference, "test_list"), *(_texts(reference, "challenge_test_list", []))]
        setup = _text(reference, "test_setup_code", "") or "\n".join(_texts(reference, "test_imports", []))
        return {"asserts": asserts, "setup": setup}
    if "test" in reference and "entry_point" in reference:
        return {"check": reference["test"], "entry_point": reference["entry_point"], "prelude": reference.get("prompt", "")}
    if "input_output" in reference:
        tests = reference["input_output"]
        try:
            tests = json.loads(tests) if isinstance(tests, str) else tests
        except ValueError as error:
            raise TestsError("tests: input_output is not JSON") from error
        if not isinstance(tests, Mapping) or not {"inputs", "outputs"} <= set(tests):
            raise TestsError("tests: input_output is no object with inputs and outputs")
        return tests
    return reference


def _read(reference: Mapping[str, Any]) -> Suite:
    limits = reference.get("limits")
    reference = _as_own_form(reference)
    if "functional" in reference:
        tests = tests_of_leetcode(_text(reference, "functional"))
        suite = Suite(tests, prelude=leetcode_prelude(), modules=leetcode_modules())
    elif "asserts" in reference:
        suite = Suite(tests_of_asserts(_texts(reference, "asserts"), _text(reference, "setup", "")))
    elif "check" in reference:
        source, name = (_text(reference, name) for name in ("check", "entry_point"))
        prelude = _text(reference, "prelude", "")
        before = prelude_without(prelude, name)
        suite = Suite(tests_of_check(source, name, prelude), before=before, prompt=prelude, function=name)
    elif "inputs" in reference and "outputs" in reference:
        encode_value(reference["outputs"])  # as deep as a comparison goes
        suite = _pairs(reference)
    else:
        raise TestsError("tests have none of the keys inputs and outputs, functional, asserts, check")
    if not 0 < len(suite.tests) <= MAX_TESTS:
        raise TestsError(f"{len(suite.tests)} usable tests")
    if not suite.checker and reference.get("checker"):
        raise TestsError("tests: a checker judges tests with inputs and outputs only")
    return replace(suite, limits=read_limits(reference.get("limits", limits)))


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
    checker = check_checker(reference["checker"]) if reference.get("checker") else ""
    if reference.get("fn_name") is None:
        return _stdio_suite(inputs, outputs, checker)
    function = find_function(_text(reference, "fn_name"))
    for given in inputs:
        if not isinstance(given, (list, dict)):
            raise TestsError("with fn_name, every input is a list of arguments or an object of named ones")
    is_exact = checker or reference.get("exact") is True
    unwraps = [False, True] if not is_exact and all(isinstance(out, list) and len(out) == 1 for out in outputs) else [False]
    has_number_keys = not is_exact and any(_with_number_keys(given, is_outermost=True) != given for given in inputs)
    conversions = [False, True] if has_number_keys else [False]
    readings = []
    for converts in conversions:
        for unwrap in unwraps:
            tests = []
            for given, expected in zip(inputs, outputs, strict=True):
                arguments = _with_number_keys(given, is_outermost=True) if converts else given
                positional, named = ([], arguments) if isinstance(arguments, dict) else (arguments, {})
                encoded = (encode_value(positional), encode_value(named))
                tests.append(CallTest(function, expected[0] if unwrap else expected, arguments=encoded, strict=False))
            readings.append(tuple(tests))
    return Suite(
        readings[0],
        other_readings=tuple(readings[1:]),
        prelude=leetcode_prelude(),
        modules=leetcode_modules(),
        checker=checker,
    )


def _stdio_suite(inputs: list[Any], outputs: list[Any], checker: str) -> Suite:
    tests = []
    for given, expected in zip(inputs, outputs, strict=True):
        stdout = None if checker and expected is None else _joined_lines(expected, "outputs")
        tests.append(StdioTest(_joined_lines(given, "inputs"), stdout))
    return Suite(tuple(tests), checker=checker)


def _joined_lines(text: Any, key: str) -> bytes:
    """A text, or a list of lines, as a program reads or prints it."""
    if isinstance(text, list) and all(isinstance(line, str) for line in text):
        text = "".join(line if line.endswith("\n") else f"{line}\n" for line in text)
    if not isinstance(text, str):
        type_name = type(text).__name__
        raise TestsError(
            f"tests: {key} without fn_name are strings (what a program reads and prints) or lists of lines, not {type_name}"
        )
    return text.encode(errors="replace")


def _with_number_keys(value: Any, is_outermost: bool = False) -> Any:
    """A value of JSON with whole numbers as keys wherever all keys of an object are such; the names of arguments stay."""
    if isinstance(value, list):
        return [_with_number_keys(item) for item in value]
    if not isinstance(value, dict):
        return value
    converts = not is_outermost and value and all(_WHOLE_NUMBER.fullmatch(key) for key in value)
    return {int(key) if converts else key: _with_number_keys(item) for key, item in value.items()}


def prelude_without(prelude: str, function: str) -> str:
    """What a prompt has beside the function to write: imports and helpers, which a program may use without repeating them.

    The function itself is left out, else a program that lacks it would have the prompt's empty one.
    """
    if len(prelude) > MAX_PRELUDE_CHARACTERS:
        raise TestsError(f"tests: prelude is longer than {MAX_PRELUDE_CHARACTERS} characters")
    for text in (prelude, f"{prelude}\n    pass\n"):  # a prompt may end with the line of the function, which has no body then
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        tree.body = [node for node in tree.body if getattr(node, "name", None) != function]
        return ast.unparse(tree)
    return ""


def completed(code: str, suite: Suite) -> str:
    """A program; if it is the indented body of the function that the prompt begins, after the prompt."""
    first = next((line for line in code.split("\n") if line.strip()), "")
    if not suite.prompt or first == first.lstrip():
        return code
    whole = suite.prompt.rstrip() + "\n" + code
    try:
        last = ast.parse(whole).body[-1]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return code
    return whole if getattr(last, "name", None) == suite.function else code


def _text(reference: Mapping[str, Any], key: str, default: str | None = None) -> str:
    value = reference.get(key, default)
    if not isinstance(value, str):
        raise TestsError(f"tests: {key} is a string, not {type(value).__name__}")
    return value


def _texts(reference: Mapping[str, Any], key: str, default: list[str] | None = None) -> list[str]:
    value = reference.get(key, default)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise TestsError(f"tests: {key} is a list of strings")
    return value
