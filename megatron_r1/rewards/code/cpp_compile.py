"""Compiles C++ inside a sandbox that shows the compiler, the headers and nothing else of the machine."""

from __future__ import annotations

from megatron_r1.rewards.code.verdicts import TestResult, failure_of, printable
from megatron_r1.rewards.sandbox.bubblewrap import find_compiler
from megatron_r1.rewards.sandbox.supervisor import SOURCE, Program, Sandbox, SandboxLimits, SandboxSettings

COMPILE_LIMITS = SandboxLimits(
    cpu_seconds=20.0, wall_seconds=40.0, memory_bytes=1 << 30, output_bytes=32 << 20, temporary_bytes=128 << 20, threads=16
)
_FLAGS = ("-std=gnu++17", "-O2", "-w", "-fmax-errors=1", "-fdiagnostics-color=never")


def compile_cpp(source: str, settings: SandboxSettings, limits: SandboxLimits = COMPILE_LIMITS) -> bytes | TestResult:
    """The executable, or the verdict "compile_error" with the first error, whatever stopped the compiler.

    Raises:
        SandboxError: see `Sandbox`.
    """
    command = (find_compiler(), "-x", "c++", *_FLAGS, "-o", "program", SOURCE)
    program = Program("command", source.encode(errors="replace"), compiler=command, collect="program")
    with Sandbox(program, limits, settings) as sandbox:
        ending = sandbox.run(b"")
    if ending.exit_code == 0 and ending.result and not ending.overflow:
        return ending.result
    errors = [line for line in ending.stderr.splitlines() if b"error:" in line]
    failure = failure_of(ending, limits)
    return TestResult(
        "compile_error", printable(errors[0]) if errors else f"the compiler: {failure.verdict if failure else 'no output'}"
    )
