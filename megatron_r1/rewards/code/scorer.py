"""Accuracy reward for code: the response's program against the problem's tests (R1 v2 (arXiv) section 2.2)."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.errors import ConfigError
from megatron_r1.rewards.code.cases import CallTest, CheckTest, StdioTest, Suite, TestsError
from megatron_r1.rewards.code.check import run_check
from megatron_r1.rewards.code.compare import agrees, is_true, output_agrees
from megatron_r1.rewards.code.cpp_compile import COMPILE_LIMITS, compile_cpp
from megatron_r1.rewards.code.cpp_source import NotForCppError, arguments_of, cpp_source, encoded_arguments
from megatron_r1.rewards.code.extract import Code, Language, find_code
from megatron_r1.rewards.code.forms import read_tests
from megatron_r1.rewards.code.verdicts import TestResult, failure_of
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.sandbox.probe import require_sandbox
from megatron_r1.rewards.sandbox.supervisor import GRACE_SECONDS, Isolation, Program, Sandbox, SandboxLimits, SandboxSettings


class CodeScorer:
    """1 if the program in a response passes every test, else 0. See `protocol.Scorer`; `forms` lists the forms of tests."""

    name = "code"

    def __init__(
        self,
        language: Language = "python",
        isolation: Isolation = "bubblewrap",
        python: str = "",
        packages: Sequence[str] = (),
        cpu_seconds: float = 5.0,
        wall_seconds: float = 15.0,
        memory_mb: int = 512,
        program_seconds: float = 60.0,
        float_tolerance: float | None = None,
        stop_at_first_failure: bool = False,
    ):
        """Args:
        language: of a block of code without a tag.
        isolation, python, packages: see `SandboxSettings`.
        cpu_seconds, wall_seconds, memory_mb: of one test. Wall time is generous: it catches sleep, not a busy machine.
        program_seconds: of all tests of a program by the clock; a test that would start later is "not_run". With compiling and the
            last test, `score` takes at most `longest_seconds`.
        float_tolerance: numbers agree within it, see `compare`; None: exactly.
        stop_at_first_failure: the tests after it are "not_run"; the score is the same.

        Raises:
            RewardError: untrusted code cannot be contained on this machine; a small program of our own tries it.
        """
        if min(cpu_seconds, wall_seconds, program_seconds, memory_mb) <= 0:
            raise ConfigError("code reward: cpu_seconds, wall_seconds, program_seconds and memory_mb must be above 0")
        self._language, self._tolerance, self._stop_early = language, float_tolerance, stop_at_first_failure
        self._program_seconds = program_seconds
        self._settings = SandboxSettings(isolation, python, tuple(packages))
        self._limits = SandboxLimits(cpu_seconds=cpu_seconds, wall_seconds=wall_seconds, memory_bytes=memory_mb << 20)
        require_sandbox(self._settings)

    @property
    def longest_seconds(self) -> float:
        """Most seconds that one `score` call takes, unless the machine stalls. A lower limit turns slow programs into time-outs."""
        return COMPILE_LIMITS.wall_seconds + self._program_seconds + self._limits.wall_seconds + GRACE_SECONDS

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`. `parts` holds "tests" (every test's verdict, in order) and "counts" (verdict -> number of tests).

        Raises:
            SandboxError: untrusted code cannot be run here. The program is never the cause.
        """
        try:
            suite = read_tests(reference)
        except TestsError as error:
            return Verdict(None, "unscorable", str(error))
        code = find_code(response, self._language)
        if code is None:
            return Verdict(0.0, "wrong", "no closed block of code after the reasoning")
        try:
            results = self._run(code, suite)
        except NotForCppError as error:  # the response chose the language
            return Verdict(0.0, "wrong", f"the program is C++, the tests are for Python: {error}")
        except TestsError as error:
            return Verdict(None, "unscorable", str(error))
        verdicts = [result.verdict for result in results]
        parts = {"tests": verdicts, "counts": dict(Counter(verdicts))}
        failed = next((index for index, verdict in enumerate(verdicts) if verdict != "accepted"), None)
        if failed is None:
            return Verdict(1.0, "correct", f"{len(results)} tests accepted", parts)
        reason = f": {results[failed].reason}" if results[failed].reason else ""
        return Verdict(0.0, "wrong", f"test {failed + 1} of {len(results)}: {verdicts[failed]}{reason}", parts)

    def _run(self, code: Code, suite: Suite) -> list[TestResult]:
        if code.language == "cpp":
            compiled = compile_cpp(code.text if suite.is_stdio else cpp_source(code.text, suite), self._settings)
            if isinstance(compiled, TestResult):
                return [compiled] * len(suite.tests)
            program = Program("command", compiled, executable=True)
        else:
            kind = "command" if suite.is_stdio else "function"
            program = Program(kind, code.text.encode(errors="replace"), prelude=suite.prelude, modules=suite.modules)
        results: list[TestResult] = []
        deadline = time.monotonic() + self._program_seconds
        with Sandbox(program, self._limits, self._settings) as sandbox:
            for test in suite.tests:
                failed = bool(results) and results[-1].verdict != "accepted"
                if failed and (results[-1].verdict == "compile_error" or self._stop_early) or time.monotonic() > deadline:
                    rest = results[-1] if failed and results[-1].verdict == "compile_error" else TestResult("not_run")
                    return results + [rest] * (len(suite.tests) - len(results))
                results.append(self._run_test(sandbox, code.language, test, deadline))
        return results

    def _run_test(
        self, sandbox: Sandbox, language: Language, test: StdioTest | CallTest | CheckTest, deadline: float
    ) -> TestResult:
        is_cpp = language == "cpp"
        if isinstance(test, StdioTest):
            ending = sandbox.run(test.stdin)
            failure = failure_of(ending, self._limits)
            return failure or _verdict_on_test(output_agrees(ending.stdout, test.stdout, self._tolerance))
        if isinstance(test, CheckTest):

            def call(arguments: Any) -> tuple[Any, TestResult | None]:
                try:
                    request = encoded_arguments(arguments) if is_cpp else _request(test.function, "", arguments)
                except NotForCppError as error:  # caught here, since the check is running in its own sandbox
                    return None, TestResult("wrong", str(error))
                return self._call(sandbox, request)

            limits = replace(
                self._limits, wall_seconds=max(1.0, deadline - time.monotonic())
            )  # the calls of the program are part of it
            return run_check(test, call, limits, self._settings)
        request = arguments_of(test) if is_cpp else _request(test.expression, test.setup, test.arguments)
        value, failure = self._call(sandbox, request)
        if failure is not None:
            return failure
        if test.truth_only:
            return _verdict_on_test(is_true(value) == test.expected)
        return _verdict_on_test(agrees(value, test.expected, strict=test.strict and not is_cpp, float_tolerance=self._tolerance))

    def _call(self, sandbox: Sandbox, request: bytes) -> tuple[Any, TestResult | None]:
        """Call the program: the encoded value, or why there is none."""
        ending = sandbox.run(request)
        failure = failure_of(ending, self._limits)
        if failure is not None:
            return None, failure
        if not ending.result:
            return None, TestResult("runtime_error", "ended before it returned a value")
        try:
            return json.loads(ending.result), None
        except (ValueError, RecursionError):  # cut short, or forged by the program
            return None, TestResult("runtime_error", "returned no value that can be read")


def _request(expression: str, setup: str, arguments: Any) -> bytes:
    """What `runner.call_function` reads."""
    return json.dumps({"expression": expression, "setup": setup, "arguments": arguments}).encode()


def _verdict_on_test(agrees_with_expected: bool) -> TestResult:
    return TestResult("accepted" if agrees_with_expected else "wrong")
