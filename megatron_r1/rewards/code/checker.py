"""Special judges: a problem's own Python that decides whether a result is right, for problems with several right results.

The record's `checker` defines `check(input, output, expected)`, which returns True or False. For a program, these are texts: what
it read, what it printed, and the expected output of the data (None if the data gives none). For a function, they are the list (or
object) of its arguments, its result and the expected one, as plain values.

A checker is untrusted like a program and runs in a sandbox of its own, in a fresh process for every test. The program never runs
there: its output goes in as data, and the verdict comes back in a descriptor that the program has never had.
"""

from __future__ import annotations

import ast
import json
import re
from typing import Any, Self

from megatron_r1.rewards.code.cases import TestsError
from megatron_r1.rewards.code.compare import is_data
from megatron_r1.rewards.code.verdicts import TestResult, failure_of
from megatron_r1.rewards.sandbox.supervisor import Program, Sandbox, SandboxLimits, SandboxSettings
from megatron_r1.rewards.sandbox.values import encode_value

FUNCTION = "check"
#: outputs on which a checker is tried if it fails and the data has no expected result
_PLAIN_OUTPUTS = ("", "0\n", "1 2\n", 0, [], [0], None)
_TRY = f"""
def r1_can_judge(given, outputs, expected):
    for output in outputs:
        try:
            if {FUNCTION}(given, output, expected) in (True, False):
                return True
        except Exception:
            pass
    return False
"""
MAX_CHECKER_CHARACTERS = 64 << 10
_IS_CPP = re.compile(r"^[ \t]*#[ \t]*include[ \t]*[<\"]|\bint[ \t]+main[ \t]*\(", re.MULTILINE)  #: testlib's, for example


def check_checker(source: Any) -> str:
    """The checker of a record.

    Raises:
        TestsError: it is no Python that defines the function.
    """
    if not isinstance(source, str) or len(source) > MAX_CHECKER_CHARACTERS:
        raise TestsError(f"tests: checker is Python of at most {MAX_CHECKER_CHARACTERS} characters")
    try:
        tree = ast.parse(source)
        problem = ""
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        tree, problem = ast.Module([], []), f"is not Python: {type(error).__name__}"
    found = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == FUNCTION]
    if found and len(found[-1].args.args) == 3:
        return source
    if _IS_CPP.search(source):
        raise TestsError(f"tests: checker is C++; only Python that defines {FUNCTION}(input, output, expected) is supported")
    raise TestsError(f"tests: checker {problem or f'defines no function {FUNCTION}(input, output, expected)'}")


class Checker:
    """Use as a context manager; `judge` takes one result at a time."""

    def __init__(self, source: str, limits: SandboxLimits, settings: SandboxSettings):
        program = Program("function", source.encode(errors="replace"))
        self._limits, self._sandbox = limits, Sandbox(program, limits, settings)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._sandbox.close()

    def judge(self, given: Any, result: Any, expected: Any) -> TestResult:
        """The verdict on a program's result.

        If the checker fails, the expected result is given to it, or if there is none, a few plain ones and the input itself. If it
        can judge one of them, the program's result is at fault, for example a word in place of a number: "wrong". Else the checker
        is at fault. So a program cannot ask for an "error" in place of a "wrong".

        Args:
            given: what the program read, or its arguments, encoded (`values.encode_value`).
            result: of the program, encoded: any JSON at all.
            expected: encoded; None: the data gives none.
        """
        if not is_data(result):
            return TestResult("wrong", "the result is no plain value")
        verdict = self._run(given, result, expected)
        if verdict.verdict in ("accepted", "wrong"):
            return verdict
        if expected is None:
            can_judge = self._run(given, [given, *_PLAIN_OUTPUTS], None, "r1_can_judge", _TRY).verdict == "accepted"
        else:
            can_judge = self._run(given, expected, expected).verdict in ("accepted", "wrong")
        return TestResult("wrong", f"the checker cannot judge this result: {verdict.reason}") if can_judge else verdict

    def _run(self, given: Any, result: Any, expected: Any, function: str = FUNCTION, setup: str = "") -> TestResult:
        request = {"expression": function, "setup": setup, "arguments": [[given, result, expected], {"dict": []}]}
        try:
            content = json.dumps(request).encode()
        except RecursionError:
            return TestResult("wrong", "the result is no plain value")
        ending = self._sandbox.run(content)
        failure = failure_of(ending, self._limits)
        if failure is not None:
            kind = "checker_timeout" if failure.verdict == "time_limit" else "checker_error"
            return TestResult(kind, f"{failure.verdict}: {failure.reason}" if failure.reason else failure.verdict)
        if ending.result == b"true":
            return TestResult("accepted")
        if ending.result == b"false":
            return TestResult("wrong", "the checker rejects it")
        return TestResult("checker_error", "the checker returned neither True nor False")


def text_value(content: bytes | None) -> Any:
    """What a program read or printed, as the checker gets it."""
    return None if content is None else encode_value(content.decode(errors="replace"))
