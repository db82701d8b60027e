"""Rounds of grpo by the processors' clock: how long engines and trainer computed in each, however busy the machine was."""

from __future__ import annotations

import subprocess
import tempfile
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from benchmarks.processes import ROOT, CommandFailed, cpu_seconds, with_descendants
from megatron_r1.rollout.channel.local import HOST_MODULE
from megatron_r1.runtime.launch import child_environment
from megatron_r1.runtime.metrics import read_metrics

_PAUSE = 0.05  # seconds between two looks for a new line of metrics.jsonl: by so much a round may be longer or shorter
_KINDS = {"engine": HOST_MODULE, "trainer": "megatron_r1.cli"}  # what the command line of such a process holds
Clocks = dict[str, list[float]]  #: "engine" and "trainer" -> processor seconds of each process of that kind


def run_by_processor_clock(command: Sequence[str], run: Path) -> dict[int, Clocks]:
    """Run grpo from the project's root with one thread, and note its processes' clocks as each step is recorded.

    Args:
        command: and its arguments.
        run: its run folder.

    Returns:
        Step -> what it took; the first recorded step is missing, since nobody knows when it began.

    Raises CommandFailed: it ended with another code than 0; the message holds its last line.
    """
    environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    found: dict[int, Clocks] = {}
    before: dict[int, float] = {}
    step, size = -1, 0
    with tempfile.TemporaryFile() as output:
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                time.sleep(_PAUSE)
                metrics = run / "metrics.jsonl"
                length = metrics.stat().st_size if metrics.exists() else 0
                if length == size:
                    continue
                size, newest = length, max((record["step"] for record in read_metrics(metrics)), default=step)
                if newest == step:
                    continue  # a line that is being written
                kinds = {pid: kind for pid in with_descendants(process.pid) if (kind := _kind_of(pid)) is not None}
                now = {pid: cpu_seconds(pid) for pid in kinds}
                if newest == step + 1 and before:
                    found[newest] = {
                        name: [now[pid] - before[pid] for pid, kind in kinds.items() if kind == name and pid in before]
                        for name in _KINDS
                    }
                step, before = newest, now
        if process.returncode != 0:
            output.seek(0)
            lines = output.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if "error" in line.lower()), "")
            raise CommandFailed(f"{' '.join(command[1:])} ended with code {process.returncode}: {last}")
    return found


def _kind_of(pid: int) -> str | None:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None  # ended meanwhile
    # The module that Python was told to run, not a launcher that has it among its arguments.
    module = next((after for word, after in pairwise(words) if word == b"-m"), b"").decode()
    return next((kind for kind, name in _KINDS.items() if module == name), None)
