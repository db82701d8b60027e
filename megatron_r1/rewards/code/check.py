"""Tests that decide for themselves: their code runs in one sandbox, the program in another, and only calls pass between them.

The program never shares a process with an expected value, and the check gets plain data, never the program's objects.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from typing import Any

from megatron_r1.rewards.code.cases import CheckTest, TestsError
from megatron_r1.rewards.code.verdicts import TestResult, failure_of, printable
from megatron_r1.rewards.sandbox.supervisor import Program, Sandbox, SandboxLimits, SandboxSettings

MAX_CALLS = 10_000
_MAX_REQUEST_BYTES = 16 << 20
_ASSERTION_FAILED, _ENDED_FROM_OUTSIDE = 4, 3  #: exit codes of `runner.be_check`

#: (encoded positional and named arguments) -> the encoded value, or why there is none
Call = Callable[[Any], tuple[Any, TestResult | None]]


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
        calls, failure = _serve(ours, call, time.monotonic() + limits.wall_seconds)
        ours.shutdown(socket.SHUT_RDWR)
        ending = running.finish()
    if failure is not None:
        return failure
    if calls == 0:
        last_words = printable(ending.stderr.rstrip().rpartition(b"\n")[2])
        raise TestsError(f"the check does not call the candidate: {last_words}")
    if ending.exit_code == 0:
        return TestResult("accepted")
    if ending.exit_code == _ASSERTION_FAILED:
        return TestResult("wrong")
    if ending.exit_code == _ENDED_FROM_OUTSIDE:
        return TestResult(
            "time_limit", f"the check took longer than {limits.wall_seconds:.0f} s, or called more than {MAX_CALLS} times"
        )
    stopped = failure_of(ending, limits)
    return TestResult("wrong", f"the check could not use the value: {stopped.verdict if stopped else 'unknown'}")


def _serve(ours: socket.socket, call: Call, deadline: float) -> tuple[int, TestResult | None]:
    """Answer calls until the check ends, a call fails, or time is up. Returns how many there were, and the failure."""
    pending, calls = b"", 0
    while calls < MAX_CALLS:
        while b"\n" not in pending:
            ours.settimeout(max(0.001, deadline - time.monotonic()))
            try:
                piece = ours.recv(1 << 16)
            except (TimeoutError, ConnectionError):
                return calls, None
            if not piece or len(pending) > _MAX_REQUEST_BYTES:
                return calls, None
            pending += piece
        line, _, pending = pending.partition(b"\n")
        calls += 1
        value, failure = call(json.loads(line))
        if failure is not None:
            return calls, failure
        try:
            ours.sendall(json.dumps(value).encode() + b"\n")
        except OSError:  # the check ended without waiting
            return calls, None
    return calls, None
