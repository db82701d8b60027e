"""Steps of an example, each a command of its own: run in order, recorded, and not done again when they are done.

`steps.json` in the folder has what each attempt at a step took; one that was killed with its parent is not in it.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_r1.errors import R1Error
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.markdown_table import align_table

ROOT = Path(__file__).resolve().parent.parent
STEPS = "steps.json"
_TOGETHER = 2  #: processes at a time of those that may run side by side: the examples are for two cores


@dataclass
class _Running:
    name: str
    command: list[str]
    began: float
    process: subprocess.Popen[bytes]
    fd: int  #: is readable when the process has ended

    @classmethod
    def start(cls, name: str, command: list[str]) -> _Running:
        process = subprocess.Popen(command, cwd=ROOT, env=environment())
        return cls(name, command, time.monotonic(), process, os.pidfd_open(process.pid))

    def wait(self) -> dict[str, Any]:
        """The record of this attempt, at its end. CPU seconds are the process's and of those that it waited for."""
        _, status, used = os.wait4(self.process.pid, 0)
        self.process.returncode = os.waitstatus_to_exitcode(status)
        os.close(self.fd)
        seconds, cpu = time.monotonic() - self.began, used.ru_utime + used.ru_stime
        return {
            "step": self.name, "command": self.command, "code": self.process.returncode, "seconds": seconds, "cpu_seconds": cpu,
        }  # fmt: skip


def run_steps(steps: Mapping[str, list[str]], out: Path, side_by_side: Collection[str] = ()) -> int:
    """Run what is not done yet.

    Args:
        steps: name -> command, in their order.
        out: folder of `steps.json`.
        side_by_side: names of steps that need nothing of each other; neighbours among them run two at a time.

    Returns:
        The exit code of the step that failed, or 0. Steps that run beside a failed one are asked to end.
    """
    attempts = read_attempts(out)
    done = {tuple(attempt["command"]) for attempt in attempts if attempt["code"] == 0}
    running: list[_Running] = []

    def record(attempt: dict[str, Any]) -> int:
        attempts.append(attempt)
        write_atomically(out / STEPS, json.dumps(attempts, indent=1) + "\n")
        return attempt["code"]

    def await_one() -> int:
        ready, _, _ = select.select([step.fd for step in running], [], [])
        step = next(step for step in running if step.fd == ready[0])
        code = record(step.wait())
        running.remove(step)
        if code:
            told = f"{Path(sys.argv[0]).name}: {step.name} ended with code {code}; the same command goes on"
            print(told, file=sys.stderr, flush=True)
        return code

    try:
        for name, command in steps.items():
            if tuple(command) in done:
                print(f"== {name}: done already", flush=True)
                continue
            while running and not (len(running) < _TOGETHER and {name, *(step.name for step in running)} <= set(side_by_side)):
                if code := await_one():
                    return code
            print(f"== {name}: {' '.join(command)}", flush=True)
            running.append(_Running.start(name, command))
        while running:
            if code := await_one():
                return code
    finally:
        for step in running:  # this process was asked to end, or another step failed: stages save and stop
            step.process.terminate()
        for step in running:
            record(step.wait() | {"code": None})
    return 0


def read_attempts(out: Path) -> list[dict[str, Any]]:
    """What was kept of earlier attempts at steps."""
    return json.loads((out / STEPS).read_text(encoding="utf-8")) if (out / STEPS).exists() else []


def cost_rows(names: Collection[str], out: Path) -> list[list[str]]:
    """Seconds by the clock and processor hours of every step, all its attempts together; the first row is the head."""
    attempts = [attempt for attempt in read_attempts(out) if attempt["step"] in names]
    rows = [["step", "seconds", "CPU hours", "attempts"]]
    for name in [*names, "all"]:
        own = [attempt for attempt in attempts if name in (attempt["step"], "all")]
        seconds, hours = sum(a["seconds"] for a in own), sum(a["cpu_seconds"] for a in own) / 3600
        rows.append([name, f"{seconds:.0f}", f"{hours:.3f}", str(len(own))])
    return rows


def cost_table(names: Collection[str], out: Path) -> str:
    """`cost_rows` as a Markdown table."""
    return align_table(cost_rows(names, out), numbers=True)


def run_example(run: Callable[[], int], show: Callable[[], str]) -> int:
    """Run an example and print what came out of it. SIGTERM ends the steps as it ends this process.

    Args:
        run: all steps; returns an exit code, and nothing is shown unless it is 0.
        show: writes the result; returns the text to print.
    """
    before = signal.signal(signal.SIGTERM, _end)
    try:
        if code := run():
            return code
        print(f"\n{show()}", flush=True)
    except R1Error as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return error.exit_code
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def environment() -> dict[str, str]:
    """Of steps: they find modules of the examples from the root of the repository."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return {**os.environ, "PYTHONPATH": path}


def _end(number: int, frame: Any) -> NoReturn:
    raise SystemExit(128 + number)
