"""Runs one test of a program, and compares outside the sandbox what came of it."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.rewards.code.cases import CallTest, CheckTest, StdioTest, Test
from megatron_r1.rewards.code.check import Answer, run_check
from megatron_r1.rewards.code.checker import Checker, text_value
from megatron_r1.rewards.code.compare import agrees, is_true, output_agrees
from megatron_r1.rewards.code.cpp_source import NotForCppError, arguments_of, encoded_arguments
from megatron_r1.rewards.code.extract import Language
from megatron_r1.rewards.code.verdicts import TestResult, failure_of
from megatron_r1.rewards.sandbox.supervisor import Sandbox, SandboxLimits, SandboxSettings
from megatron_r1.rewards.sandbox.values import encode_value


class TestRunner:
    """Runs the tests of one program in its sandbox.

    Args:
        checker: the problem's, or None: results are compared with the expected ones.
    """

    __test__ = False  # not a test of pytest's

    def __init__(
        self,
        sandbox: Sandbox,
        language: Language,
        limits: SandboxLimits,
        settings: SandboxSettings,
        float_tolerance: float | None,
        checker: Checker | None,
    ):
        self._sandbox, self._is_cpp, self._limits, self._settings = sandbox, language == "cpp", limits, settings
        self._tolerance, self._checker = float_tolerance, checker

    def run(self, readings: Sequence[Test], deadline: float) -> list[TestResult]:
        """The results of one test in all its readings. Those that differ in the expected value only share a run.

        Args:
            deadline: of the whole program, on the monotonic clock.
        """
        values: dict[Any, tuple[Any, TestResult | None]] = {}
        results = []
        for test in readings:
            if isinstance(test, StdioTest):
                results.append(self._run_program(test))
            elif isinstance(test, CheckTest):
                # The calls of the program are part of the check's time.
                limits = replace(self._limits, wall_seconds=max(1.0, deadline - time.monotonic()))
                results.append(run_check(test, lambda steps, of=test: self._answer(of, steps), limits, self._settings))
            else:
                request = arguments_of(test) if self._is_cpp else _request(test.expression, test.setup, test.arguments)
                if request not in values:
                    values[request] = self._call(request)
                results.append(self._judge(test, *values[request]))
        return results

    def _run_program(self, test: StdioTest) -> TestResult:
        ending = self._sandbox.run(test.stdin)
        failure = failure_of(ending, self._limits)
        if failure is not None:
            return failure
        if self._checker is not None:
            return self._checker.judge(text_value(test.stdin), text_value(ending.stdout), text_value(test.stdout))
        return _as_result(output_agrees(ending.stdout, test.stdout or b"", self._tolerance))

    def _judge(self, test: CallTest, value: Any, failure: TestResult | None) -> TestResult:
        if failure is not None:
            return failure
        if test.truth_only:
            return _as_result(is_true(value) == test.expected)
        if self._checker is not None and test.arguments is not None:
            positional, named = test.arguments
            given = positional if not named["dict"] else named
            return self._checker.judge(given, value, None if test.expected is None else encode_value(test.expected))
        return _as_result(agrees(value, test.expected, strict=test.strict and not self._is_cpp, float_tolerance=self._tolerance))

    def _answer(self, test: CheckTest, steps: list[Any]) -> tuple[Answer, TestResult | None]:
        """What a check is told of the steps that it took; or why it is ended."""
        if self._is_cpp:
            try:
                if len(steps) != 1:
                    raise NotForCppError("the check uses an object of Python's")
                request = encoded_arguments(steps[0][2])
            except NotForCppError as error:  # caught here, since the check is running in its own sandbox
                return {}, TestResult("wrong", str(error))
            value, failure = self._call(request)
            return {"value": value, "arguments": None}, failure
        answer, failure = self._call(_request(test.function, "", None, steps))
        if failure is None and not _is_answer(answer):
            failure = TestResult("runtime_error", "returned no value that can be read")
        return answer, failure

    def _call(self, request: bytes) -> tuple[Any, TestResult | None]:
        """Call the program: the encoded value, or why there is none."""
        ending = self._sandbox.run(request)
        failure = failure_of(ending, self._limits)
        if failure is not None:
            return None, failure
        if not ending.result:
            return None, TestResult("runtime_error", "ended before it returned a value")
        try:
            return json.loads(ending.result), None
        except (ValueError, RecursionError, MemoryError):  # cut short, or forged by the program
            return None, TestResult("runtime_error", "returned no value that can be read")


def _is_answer(answer: Any) -> bool:
    """Whether a program's answer to steps has the form of `sandbox.remote.carry_out`: it may be forged."""
    if not isinstance(answer, dict):
        return False
    if set(answer) == {"raised"}:
        raised = answer["raised"]
        is_pair = isinstance(raised, list) and len(raised) == 2 and isinstance(raised[0], list)
        return is_pair and isinstance(raised[1], str) and all(isinstance(name, str) for name in raised[0])
    return set(answer) == {"value", "arguments"}


def _request(expression: str, setup: str, arguments: Any, steps: list[Any] | None = None) -> bytes:
    """What `runner.call_function` reads."""
    return json.dumps({"expression": expression, "setup": setup, "arguments": arguments, "steps": steps}).encode()


def _as_result(agrees_with_expected: bool) -> TestResult:
    return TestResult("accepted" if agrees_with_expected else "wrong")
