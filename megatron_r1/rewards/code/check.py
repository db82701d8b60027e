"""Tests that decide for themselves: their code runs in one sandbox, the program in another, and only calls pass between them.

The program never shares a process with an expected value, and the check gets plain data, never the program's objects: those stay
where they are, and the check uses them from afar (`sandbox.remote`). An exception of the program is raised again in the check,
which may expect it.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from megatron_r1.rewards.code.cases import CheckTest, TestsError
from megatron_r1.rewards.code.verdicts import TestResult, failure_of, printable
from megatron_r1.rewards.sandbox.supervisor import WATCH_SECONDS, Program, RunningTest, Sandbox, SandboxLimits, SandboxSettings

MAX_CALLS = 10_000
_MAX_REQUEST_BYTES = 16 << 20
_ASSERTION_FAILED, _ENDED_FROM_OUTSIDE = 4, 3  #: exit codes of `runner.be_check`

Answer = dict[str, Any]  #: to the steps of a check, see `sandbox.remote.carry_out`
Call = Callable[[list[Any]], tuple[Answer, TestResult | None]]  #: steps -> the answer, or why there is none


def run_check(test: CheckTest, call: Call, limits: SandboxLimits, settings: SandboxSettings) -> TestResult:
    """Run the check; its calls of the candidate go through `call`.

    Args:
        call: runs the program once.
        limits: of the check, CPU time without the program's.

    Raises:
        TestsError: the check fails before it has called the candidate, or never calls it: it cannot be used.
        SandboxError: see `Sandbox`.
    """
    program = Program(
        "check", test.source.encode(errors="replace"), check_prelude=test.prelude, candidate_names=test.candidate_names
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with Sandbox(program, limits, settings) as sandbox, ours:
        try:
            running = sandbox.start(theirs.fileno())
        finally:
            theirs.close()
        calls, failure, raised = _serve(ours, running, call, time.monotonic() + limits.wall_seconds)
        ours.shutdown(socket.SHUT_RDWR)
        ending = running.finish()
    if failure is not None:
        return failure
    if calls == 0:
        last_words = printable(ending.stderr.rstrip().rpartition(b"\n")[2])
        raise TestsError(f"the check does not call the candidate: {last_words}")
    if ending.exit_code == 0:
        return TestResult("accepted")
    if raised is not None:  # the check let it pass
        return raised
    if ending.exit_code == _ASSERTION_FAILED:
        return TestResult("wrong")
    if ending.exit_code == _ENDED_FROM_OUTSIDE:
        return TestResult(
            "time_limit", f"the check took longer than {limits.wall_seconds:.0f} s, or called more than {MAX_CALLS} times"
        )
    stopped = failure_of(ending, limits)
    return TestResult("wrong", f"the check could not use the value: {stopped.verdict if stopped else 'unknown'}")


def _serve(
    ours: socket.socket, running: RunningTest, call: Call, deadline: float
) -> tuple[int, TestResult | None, TestResult | None]:
    """Answer calls until the check ends, a call fails, or time is up.

    Returns: how many there were; the failure; and the verdict if the last call raised an exception, which the check may expect.
    """
    pending, calls, raised = b"", 0, None
    while calls < MAX_CALLS:
        while b"\n" not in pending:
            ours.settimeout(min(WATCH_SECONDS, max(0.001, deadline - time.monotonic())))
            try:
                piece = ours.recv(1 << 16)
            except TimeoutError:
                if running.watch(0.001) or time.monotonic() > deadline:
                    return calls, None, raised
                continue
            except ConnectionError:
                return calls, None, raised
            if not piece or len(pending) > _MAX_REQUEST_BYTES:
                return calls, None, raised
            pending += piece
        line, _, pending = pending.partition(b"\n")
        calls += 1
        try:
            steps = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TestsError("the check asks for a call that cannot be read") from error
        answer, failure = call(steps)
        if failure is not None:
            return calls, failure, None
        try:
            raised = _raised_result(answer)
            reply = json.dumps(answer).encode() + b"\n"
        except RecursionError:  # forged: as deep as can be read, which is a little deeper than can be written
            return calls, TestResult("runtime_error", "returned no value that can be read"), None
        ours.settimeout(max(0.001, deadline - time.monotonic()))
        try:
            ours.sendall(reply)
        except OSError:  # the check ended without waiting
            return calls, None, raised
    return calls, None, raised


def _raised_result(answer: Answer) -> TestResult | None:
    """The verdict on a program whose exception a check did not expect; None if it raised none."""
    if "raised" not in answer:
        return None
    names, message = answer["raised"]
    line = f"{names[0] if names else 'Exception'}: {message}".partition("\n")[0]
    return TestResult("runtime_error", f"exit code 1: {printable(line.encode(errors='replace'))}")
