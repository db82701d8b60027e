"""The two sides as processes: their turns, their memory, and what becomes of them when the benchmark ends."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from benchmarks.processes import ROOT, CommandFailed, cpu_seconds, resident_bytes, with_descendants
from megatron_r1.runtime.launch import child_environment

_POLL_SECONDS = 0.2  # between two looks at memory
_END_SECONDS = 60.0  # that a side has to end by itself


@dataclass
class Turn:
    """What one turn of a side took."""

    wall_seconds: float
    cpu_seconds: float  #: of all processes of the side
    peak_bytes: int  #: resident, of all its processes together; what they share counts for each
    report: dict[str, Any] = field(default_factory=dict)  #: what the side says of it


class RunningSide:
    """One side, waiting for its turns. Use it as a context manager.

    Args:
        name: in messages.
        command: to which the numbers of two file descriptors are given, see `gate.Gate`.
        arguments: behind these.
        environment: further variables.
        log: takes what it prints.

    Raises:
        CommandFailed: it ended by itself.
    """

    def __init__(self, name: str, command: Sequence[str], arguments: Sequence[str], environment: dict[str, str], log: Path) -> None:
        self.name, self._log, self._seen = name, log, b""
        theirs_in, self._commands = os.pipe()
        self._reports, theirs_out = os.pipe()
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                [*command, str(theirs_in), str(theirs_out), *arguments],
                cwd=ROOT,
                env=child_environment({"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **environment}),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs_in, theirs_out),
                start_new_session=True,  # Ctrl-C comes to the benchmark alone
            )
        os.close(theirs_in)
        os.close(theirs_out)
        self._cpu, self._waits = 0.0, False
        self._resident = 0  # at the end of the last turn

    def started(self) -> Turn:
        """Wait until it is ready for its first turn."""
        return self._until_ready()

    def turn(self, command: str = "go") -> Turn:
        """Give it a turn and wait until it is ready for the next."""
        self._waits = False
        with suppress(BrokenPipeError):  # it ended while it waited, which is said below
            os.write(self._commands, f"{command}\n".encode())
        return self._until_ready()

    def _until_ready(self) -> Turn:
        started, peak = time.perf_counter(), 0
        while b"\n" not in self._seen:
            if select.select([self._reports], [], [], _POLL_SECONDS)[0]:
                read = os.read(self._reports, 1 << 20)
                if not read:
                    raise CommandFailed(f"{self.name} ended early: {self._why_it_ended(peak or self._resident)}")
                self._seen += read
            if b"\n" not in self._seen:
                peak = max(peak, sum(map(resident_bytes, with_descendants(self._process.pid))))
        wall = time.perf_counter() - started
        tree = with_descendants(self._process.pid)
        self._waits = True
        line, _, self._seen = self._seen.partition(b"\n")
        used = sum(map(cpu_seconds, tree))
        before, self._cpu = self._cpu, used
        self._resident = sum(map(resident_bytes, tree))
        return Turn(wall, used - before, max(peak, self._resident), json.loads(line))

    def _why_it_ended(self, peak: int) -> str:
        """Its last error; one that was killed has none."""
        try:
            if self._process.wait(_END_SECONDS) == -signal.SIGKILL:
                return f"killed, with {peak / 1e9:.1f} GB in use: did the machine run out of memory?"
        except subprocess.TimeoutExpired:
            pass  # it closed its end of the pipe and hangs
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return next((line for line in reversed(lines) if "error" in line.lower()), lines[-1] if lines else "it printed nothing")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """One that waits for a command finds the pipe closed, and ends; any other is asked to, and ended if it does not."""
        os.close(self._commands)
        os.close(self._reports)
        if not self._waits:
            self._process.terminate()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
