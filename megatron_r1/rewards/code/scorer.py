"""Accuracy reward for code: the response's program against the problem's tests (R1 v2 (arXiv) section 2.2)."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from megatron_r1.errors import ConfigError
from megatron_r1.rewards.code.cases import StdioTest, Suite, TestsError
from megatron_r1.rewards.code.checker import Checker
from megatron_r1.rewards.code.cpp_cache import CppCache
from megatron_r1.rewards.code.cpp_compile import COMPILE_LIMITS, HEADER_SECONDS, compile_answer
from megatron_r1.rewards.code.cpp_source import NotForCppError, cpp_source, function_name
from megatron_r1.rewards.code.extract import Code, Language, Wanted, find_code
from megatron_r1.rewards.code.forms import completed, read_tests
from megatron_r1.rewards.code.limits import LIMIT_NAMES, MOST, ProblemLimits, check_limits, limits_of, sandbox_limits
from megatron_r1.rewards.code.program_names import program_start
from megatron_r1.rewards.code.run_test import TestRunner
from megatron_r1.rewards.code.verdicts import CHECKER_FAILED, TestResult
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.sandbox.probe import require_sandbox
from megatron_r1.rewards.sandbox.supervisor import GRACE_SECONDS, Isolation, Program, Sandbox, SandboxSettings


class CodeScorer:
    """1 if the program in a response passes every test, else 0, or the share of tests that it passes.

    See `protocol.Scorer`; `forms` lists the forms of tests.
    """

    name = "code"

    def __init__(
        self,
        language: Language = "python",
        isolation: Isolation = "bubblewrap",
        python: str = "",
        packages: Sequence[str] = (),
        cpu_seconds: float = 5.0,
        wall_seconds: float = 15.0,
        memory_mb: float = 512,
        output_mb: float = 1,
        stack_mb: float = 256,
        recursion_depth: float = 50_000,
        most: Mapping[str, float] | None = None,
        program_seconds: float = 60.0,
        float_tolerance: float | None = None,
        stop_at_first_failure: bool = False,
        partial_credit: bool = False,
        cpp_cache_mb: int = 1024,
    ):
        """Args:
        language: of a block of code without a tag.
        isolation, python, packages: see `SandboxSettings`.
        cpu_seconds, wall_seconds, memory_mb, output_mb, stack_mb, recursion_depth: of one test, see `ProblemLimits`. Wall time is
            generous: it catches sleep, not a busy machine.
        most: the limits that a problem may have at most; None: `limits.MOST`.
        program_seconds: of all tests of a program by the clock; a test that would start later is "not_run". With compiling and the
            last test, `score` takes at most `longest_seconds`.
        float_tolerance: numbers agree within it, see `compare`; None: exactly.
        stop_at_first_failure: the tests after it are "not_run"; the score is the same.
        partial_credit: the score is the share of tests that are accepted; the outcome is "correct" only if all are.
        cpp_cache_mb: see `CppCache`.

        Raises:
            ConfigError: a limit is out of bounds, or partial credit is asked for with the tests after a failure left out.
            RewardError: untrusted code cannot be contained on this machine; a small program of our own tries it.
        """
        self._defaults = ProblemLimits(cpu_seconds, wall_seconds, memory_mb, output_mb, stack_mb, recursion_depth)
        check_limits(self._defaults, "reward.code")
        if unknown := set(most or {}) - set(LIMIT_NAMES):
            raise ConfigError(f"reward.code.most.{min(unknown)} is unknown; there are {', '.join(LIMIT_NAMES)}")
        self._most = replace(MOST, **(most or {}))
        check_limits(self._most, "reward.code.most")
        if not 0 < program_seconds < math.inf:
            raise ConfigError(f"reward.code.program_seconds={program_seconds} must be above 0")
        if float_tolerance is not None and not 0 <= float_tolerance < math.inf:
            raise ConfigError(f"reward.code.float_tolerance={float_tolerance} must be 0 or more, or null")
        if partial_credit and stop_at_first_failure:
            raise ConfigError("code reward: partial_credit needs all tests: set stop_at_first_failure=false")
        self._language, self._tolerance, self._stop_early = language, float_tolerance, stop_at_first_failure
        self._program_seconds, self._partial_credit = program_seconds, partial_credit
        self._settings = SandboxSettings(isolation, python, tuple(packages))
        self._cache = CppCache.open(cpp_cache_mb << 20)
        require_sandbox(self._settings)

    @property
    def longest_seconds(self) -> float:
        """Most seconds that one `score` call takes, unless the machine stalls. A lower limit turns slow programs into time-outs."""
        wall = max(self._defaults.wall_seconds, self._most.wall_seconds)
        return 2 * (HEADER_SECONDS + COMPILE_LIMITS.wall_seconds) + self._program_seconds + 3 * (wall + GRACE_SECONDS)

    def score(self, response: str, reference: Any) -> Verdict:
        """See `Scorer`. `parts` holds "tests" (every test's verdict, in order) and "counts" (verdict -> number of tests).

        Raises:
            SandboxError: untrusted code cannot be run here. The program is never the cause.
        """
        try:
            suite = read_tests(reference)
        except TestsError as error:
            return Verdict(None, "unscorable", str(error))
        code = find_code(response, self._language, _wanted(suite))
        if code is None:
            return Verdict(0.0, "wrong", "no closed block of code after the reasoning")
        try:
            results = self._run(code, suite)
        except NotForCppError as error:  # the response chose the language
            return Verdict(0.0, "wrong", f"the program is C++, the tests are for Python: {error}")
        except TestsError as error:
            return Verdict(None, "unscorable", str(error))
        return self._verdict(results)

    def _verdict(self, results: list[TestResult]) -> Verdict:
        verdicts = [result.verdict for result in results]
        parts = {"tests": verdicts, "counts": dict(Counter(verdicts))}
        failures = [index for index, verdict in enumerate(verdicts) if verdict != "accepted"]
        if not failures:
            return Verdict(1.0, "correct", f"{len(results)} tests accepted", parts)

        def describe(index: int) -> str:
            reason = f": {results[index].reason}" if results[index].reason else ""
            return f"test {index + 1} of {len(results)}: {verdicts[index]}{reason}"

        rejecting = [index for index in failures if verdicts[index] not in (*CHECKER_FAILED, "not_run")]
        by_checker = [index for index in failures if verdicts[index] in CHECKER_FAILED]
        if by_checker and not rejecting:  # nothing is known against the program
            outcome = "timeout" if verdicts[by_checker[0]] == "checker_timeout" else "error"
            return Verdict(None, outcome, describe(by_checker[0]), parts)
        share = verdicts.count("accepted") / len(verdicts) if self._partial_credit else 0.0
        return Verdict(share, "wrong", describe((rejecting or failures)[0]), parts)

    def _run(self, code: Code, suite: Suite) -> list[TestResult]:
        limits = limits_of(suite, self._defaults, self._most)
        of_program = sandbox_limits(limits, code.language)
        if code.language == "cpp":
            source = code.text if suite.is_stdio else cpp_source(code.text, suite)
            compiled = compile_answer(source, self._settings, code.standard, self._cache)
            if isinstance(compiled, TestResult):
                return [compiled] * len(suite.tests)
            program = Program("command", compiled, executable=True)
        elif suite.is_stdio:
            start = program_start(of_program.recursion_depth)
            program = Program("command", code.text.encode(errors="replace"), start=start)
        else:
            text = completed(code.text, suite).encode(errors="replace")
            program = Program("function", text, prelude=suite.prelude, modules=suite.modules, before=suite.before)
        checker_limits = sandbox_limits(replace(self._defaults, output_mb=1), "python")
        checker = Checker(suite.checker, checker_limits, self._settings) if suite.checker else nullcontext()
        with Sandbox(program, of_program, self._settings) as sandbox, checker as opened:
            runner = TestRunner(sandbox, code.language, of_program, self._settings, self._tolerance, opened)
            return self._run_tests(runner, (suite.tests, *suite.other_readings))

    def _run_tests(self, runner: TestRunner, readings: tuple[tuple[Any, ...], ...]) -> list[TestResult]:
        """Every test's result, in the first reading in which the program passes as many from the start as it can."""
        alive = list(range(len(readings)))
        results: list[TestResult] = []
        deadline = time.monotonic() + self._program_seconds
        for tests in zip(*readings, strict=True):
            failed = bool(results) and results[-1].verdict != "accepted"
            if failed and (results[-1].verdict == "compile_error" or self._stop_early) or time.monotonic() > deadline:
                rest = results[-1] if failed and results[-1].verdict == "compile_error" else TestResult("not_run")
                return results + [rest] * (len(readings[0]) - len(results))
            in_readings = dict(zip(alive, runner.run([tests[index] for index in alive], deadline), strict=True))
            alive = [index for index in alive if in_readings[index].verdict == "accepted"] or alive
            results.append(in_readings[alive[0]])
        return results


def _wanted(suite: Suite) -> Wanted:
    if suite.is_stdio:
        return Wanted(reads_input=any(isinstance(test, StdioTest) and test.stdin.strip() for test in suite.tests))
    try:
        return Wanted(function=function_name(suite.tests[0]))
    except NotForCppError:
        return Wanted()
