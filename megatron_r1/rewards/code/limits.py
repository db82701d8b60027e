"""What a program may take: the settings, what the problem asks for, and the most that a problem gets."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_r1.errors import ConfigError
from megatron_r1.rewards.code.cases import CallTest, StdioTest, Suite, TestsError
from megatron_r1.rewards.code.extract import Language
from megatron_r1.rewards.sandbox.supervisor import SandboxLimits

PYTHON_STACK_BYTES = 64 << 20  #: every thread of a program takes this much address space; recursion in Python needs none of it


@dataclass(frozen=True)
class ProblemLimits:
    """Of one test of a problem."""

    cpu_seconds: float = 5.0
    wall_seconds: float = 15.0  #: by the clock
    memory_mb: float = 512
    output_mb: float = 1
    stack_mb: float = 256  #: of a C++ program, part of its memory
    recursion_depth: float = 50_000  #: of Python functions


#: a problem gets no more, whatever it asks for: a record is untrusted data
MOST = ProblemLimits(cpu_seconds=20, wall_seconds=60, memory_mb=2048, output_mb=64, stack_mb=512, recursion_depth=1_000_000)
LIMIT_NAMES = tuple(asdict(MOST))
#: below, no program could pass; above, the kernel or Python takes no such number
_LEAST = ProblemLimits(cpu_seconds=0.01, wall_seconds=0.1, memory_mb=4, output_mb=1e-6, stack_mb=0.0625, recursion_depth=1)
_GREATEST = ProblemLimits(
    cpu_seconds=1e6, wall_seconds=1e6, memory_mb=1 << 24, output_mb=2048, stack_mb=1 << 20, recursion_depth=1e8
)
_PYTHON_BYTES = 32 << 20  #: the interpreter's own need is not the problem's: a problem of 4 MiB is for C++


def check_limits(limits: ProblemLimits, key: str) -> None:
    """Raises:
    ConfigError: a limit of the settings is no number, or none that a program could be run with.
    """
    for name, value in asdict(limits).items():
        least, greatest = getattr(_LEAST, name), getattr(_GREATEST, name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= greatest:
            raise ConfigError(f"{key}.{name}={value} is no limit for a program: choose a number from {least:g} to {greatest:.10g}")


def read_limits(value: Any) -> dict[str, float]:
    """The limits of a problem's record.

    Raises:
        TestsError: they are no object of known names and positive numbers.
    """
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise TestsError(f"tests: limits is an object with some of {', '.join(LIMIT_NAMES)}, not {type(value).__name__}")
    for name, limit in value.items():
        if name not in LIMIT_NAMES:
            raise TestsError(f"tests: limits.{str(name)[:40]} is unknown; there are {', '.join(LIMIT_NAMES)}")
        if isinstance(limit, bool) or not isinstance(limit, (int, float)) or not (0 < limit < 1e12 and math.isfinite(limit)):
            raise TestsError(f"tests: limits.{name} is a number above 0")
        if limit < getattr(_LEAST, name):
            raise TestsError(f"tests: limits.{name}={limit:g} leaves no program a chance: at least {getattr(_LEAST, name):g}")
    return dict(value)


def limits_of(suite: Suite, defaults: ProblemLimits, most: ProblemLimits) -> ProblemLimits:
    """What a problem gets: what it asks for, else the defaults; at most `most`, or the default if that is more.

    A problem that asks for more CPU time gets three times as much by the clock. Its outputs may be twice as long as the longest
    that its tests expect; this is rounded up to a power of two MiB, so a program learns next to nothing of them.
    """
    wanted = dict(suite.limits)
    if "cpu_seconds" in wanted:
        wanted.setdefault("wall_seconds", max(defaults.wall_seconds, 3 * wanted["cpu_seconds"]))
    longest = max(map(_expected_bytes, suite.tests)) / (1 << 20)
    if "output_mb" not in wanted and 2 * longest > defaults.output_mb:
        wanted["output_mb"] = 2.0 ** math.ceil(math.log2(2 * longest))
    bounded = {name: min(limit, max(getattr(most, name), getattr(defaults, name))) for name, limit in wanted.items()}
    return replace(defaults, **bounded)


def sandbox_limits(limits: ProblemLimits, language: Language) -> SandboxLimits:
    """The limits as the sandbox takes them."""
    memory, stack = (max(1, int(megabytes * (1 << 20))) for megabytes in (limits.memory_mb, limits.stack_mb))
    output = max(1, int(limits.output_mb * (1 << 20)))
    return SandboxLimits(
        cpu_seconds=limits.cpu_seconds,
        wall_seconds=limits.wall_seconds,
        memory_bytes=memory if language == "cpp" else max(memory, _PYTHON_BYTES),
        output_bytes=output,
        temporary_bytes=max(SandboxLimits.temporary_bytes, output),
        stack_bytes=stack if language == "cpp" else PYTHON_STACK_BYTES,
        recursion_depth=max(50, int(limits.recursion_depth)),
    )


def _expected_bytes(test: Any) -> int:
    if isinstance(test, StdioTest):
        return len(test.stdout or b"")
    return 2 * len(repr(test.expected)) if isinstance(test, CallTest) else 0  # its encoded form is longer
