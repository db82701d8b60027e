"""Limits by the clock that hold on a busy machine: they are written for an idle one, and multiplied by how slow this one is now.

The factor is measured by starting a process that does a fixed piece of work. A test that waits for an event asks `wait_until`,
which measures again before it gives up; where only a number can be handed over (the timeout of a subprocess, a time-out of the
product that must not fire), it is `patient(seconds)`. Tests that are about time compare two measurements instead.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_WORK = "sum(number * number for number in range(2_000_000))"
_IDLE_SECONDS = 0.25  # of that work and its process, on a slow core that has nothing else to do
_FRESH_SECONDS = 20.0  # a measurement holds so long

_measured: tuple[float, float] | None = None  # the factor, and when it was measured


def slowness() -> float:
    """How many times slower than on an idle machine things are now; never below 1."""
    global _measured
    if _measured is None or time.monotonic() - _measured[1] > _FRESH_SECONDS:
        started = time.monotonic()
        subprocess.run([sys.executable, "-S", "-E", "-c", _WORK], check=True)
        ended = time.monotonic()
        _measured = max(1.0, (ended - started) / _IDLE_SECONDS, _waiting_per_core()), ended
    return _measured[0]


def patient(seconds: float) -> float:
    """A limit of `seconds` on an idle machine, for this one."""
    return seconds * slowness()


def wait_until(condition: Callable[[], object], seconds: float, what: str = "event", pause: float = 0.02) -> None:
    """Wait until a condition holds, at most `seconds` of an idle machine: times the slowness at the start, or a higher one later.

    Raises:
        AssertionError: the condition does not hold in time.
    """
    started, factor = time.monotonic(), slowness()
    while not condition():
        if time.monotonic() - started > seconds * factor:
            if slowness() <= factor:
                raise AssertionError(f"no {what} in {seconds:.0f} s, times {factor:.1f} for the load of this machine")
            factor = slowness()
        time.sleep(pause)


def _waiting_per_core() -> float:
    """Processes that want a core, for each core there is. A short measurement may be served before those that wait long."""
    running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
    return running / len(os.sched_getaffinity(0))
