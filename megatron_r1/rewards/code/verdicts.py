"""How a test ended, as the verdict on the program."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal, get_args

from megatron_r1.rewards.sandbox.supervisor import Ending, SandboxLimits

TestVerdict = Literal[
    "accepted", "wrong", "runtime_error", "time_limit", "memory_limit", "output_limit", "compile_error", "not_run",
    "checker_error", "checker_timeout",
]  # fmt: skip
CHECKER_FAILED: tuple[TestVerdict, ...] = ("checker_error", "checker_timeout")  #: nothing is known of the program
VERDICTS: tuple[TestVerdict, ...] = get_args(TestVerdict)

_OUT_OF_MEMORY = (b"MemoryError", b"terminate called after throwing an instance of 'std::bad_alloc'")
_SYNTAX_ERRORS = (b"SyntaxError:", b"IndentationError:", b"TabError:")
_NEAR_LIMIT = 0.9  #: share of the address space that was resident at the peak; a failure above it is taken for lack of memory
_MAX_REASON_CHARACTERS = 160


@dataclass(frozen=True)
class TestResult:
    """One test's verdict, and one line that says why, which never holds an expected value."""

    verdict: TestVerdict
    reason: str = ""


def failure_of(ending: Ending, limits: SandboxLimits) -> TestResult | None:
    """The verdict on a program that did not end in order; None if it did.

    Lack of memory shows in the program's last words (MemoryError, bad_alloc) or in its peak, a syntax error of Python in its last
    words. A program can imitate both, but only exchanges one failure for another.
    """
    if ending.overflow or ending.ended_by == "files" or ending.signal == signal.SIGXFSZ:
        return TestResult("output_limit")
    if ending.ended_by == "time":
        return TestResult("time_limit", f"{ending.wall_seconds:.1f} s by the clock")
    if ending.ended_by == "memory":
        return TestResult("memory_limit", "memory and its page tables")
    if ending.signal == signal.SIGXCPU or ending.cpu_seconds > limits.cpu_seconds:
        return TestResult("time_limit", f"{ending.cpu_seconds:.1f} s of CPU")
    if ending.exit_code == 0:
        return None
    last = ending.stderr.rstrip().rpartition(b"\n")[2]
    words = printable(last)
    if ending.stderr.lstrip().startswith(_OUT_OF_MEMORY) or last.startswith(_OUT_OF_MEMORY):
        return TestResult("memory_limit", words)
    if ending.peak_bytes >= _NEAR_LIMIT * limits.memory_bytes:
        return TestResult("memory_limit", words)
    if last.startswith(_SYNTAX_ERRORS):
        return TestResult("compile_error", words)
    how = f"exit code {ending.exit_code}" if ending.signal is None else f"signal {ending.signal}"
    return TestResult("runtime_error", f"{how}: {words}" if words else how)


def printable(line: bytes) -> str:
    """One short line that is safe to print: no control characters, no escape sequences."""
    text = line[: 4 * _MAX_REASON_CHARACTERS].decode(errors="replace")
    return "".join(character if character.isprintable() else "?" for character in text)[:_MAX_REASON_CHARACTERS]
