"""A command of ours as a user starts it, with the time it took and the peak memory of each of its processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.errors import R1Error
from megatron_r1.runtime.launch import child_environment

ROOT = Path(__file__).resolve().parents[1]
_POLL_SECONDS = 0.02  # of a command whose work is told from its start and end; looking costs a twentieth of a core
_SLOW_POLL_SECONDS = 0.1  # of any other
_TICK_SECONDS = 1 / os.sysconf("SC_CLK_TCK")


class CommandFailed(R1Error):
    """A command that was to be measured ended with an error."""

    exit_code = 1


@dataclass(frozen=True)
class Finished:
    """What one command took."""

    wall_seconds: float  #: from its start to its end
    cpu_seconds: float  #: of all its processes
    work_wall_seconds: float  #: of these, from its first data file to its result; all of them where there is neither
    work_cpu_seconds: float  #: likewise
    peak_bytes: list[int]  #: resident, of each process (VmHWM: libraries included), largest first


def python_command(script: str, processes: int) -> list[str]:
    """Start of the command line that runs a script of the project in one process, or in several through torchrun."""
    if processes == 1:
        return [sys.executable, script]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script]


def run_watched(command: Sequence[str], data_file: str | None = None, result: Path | None = None) -> Finished:
    """Run a command from the project's root with one thread, and watch it and all its descendants until it ends.

    It is looked at every 0.02 s, or 0.1 s without `data_file` and `result`: by so much its work may be longer or shorter, and what
    a process grows by in its last moments is missed.

    Args:
        command: and its arguments.
        data_file: work begins when a process has a file open whose name has this in it; None: at the start.
        result: work ends when this is there; None: with the command.

    Raises:
        CommandFailed: it ended with another code than 0; the message holds its last line.
    """
    environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
    peaks: dict[int, int] = {}
    begun, ended = None if data_file else (0.0, 0.0), None
    pause = _POLL_SECONDS if data_file or result else _SLOW_POLL_SECONDS
    with tempfile.TemporaryFile() as output:
        cpu, start = _ended_children_cpu_seconds(), time.perf_counter()
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT) as process:
            while process.poll() is None:
                tree = with_descendants(process.pid)
                now = time.perf_counter() - start, sum(map(cpu_seconds, tree))
                if ended is None and result is not None and result.exists():
                    ended = now
                for pid in tree:
                    peaks[pid] = max(peaks.get(pid, 0), _number_after("VmHWM:", pid, "status") << 10)
                if begun is None and any(data_file in os.path.basename(path) for pid in tree for path in _open_files(pid)):
                    begun = now
                time.sleep(pause)
        whole = time.perf_counter() - start, _ended_children_cpu_seconds() - cpu
        if process.returncode != 0:
            output.seek(0)
            lines = output.read().decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if "error" in line.lower()), "")
            raise CommandFailed(f"{' '.join(command[1:])} ended with code {process.returncode}: {last}")
    work = (until - since for since, until in zip(begun or (0.0, 0.0), ended or whole, strict=True))
    return Finished(*whole, *work, sorted(peaks.values(), reverse=True))


@contextmanager
def serve_rules() -> Iterator[str]:
    """`tools/serve_tally_rules.py`, the stand-in for a served judge, for the block; its URL."""
    command = [sys.executable, str(ROOT / "tools/serve_tally_rules.py"), "--port", "0"]
    environment = child_environment({"PYTHONPATH": str(ROOT)})
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()


def _ended_children_cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _open_files(pid: int) -> Iterator[str]:
    try:
        for link in os.scandir(f"/proc/{pid}/fd"):
            yield os.readlink(link.path)
    except OSError:
        return  # ended meanwhile


def cpu_seconds(pid: int) -> float:
    """Of a process and of those of its children that have ended."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) * _TICK_SECONDS


def parent_of(pid: int) -> int:
    """Of a process; 0 if it has ended."""
    fields = _read(pid, "stat").rpartition(")")[2].split()
    return int(fields[1]) if fields else 0


def resident_bytes(pid: int) -> int:
    """Memory of a process, libraries included; 0 if it has ended."""
    return _number_after("VmRSS:", pid, "status") << 10


def with_descendants(pid: int) -> list[int]:
    """A process, its children, theirs and so on."""
    found = [pid]
    for parent in found:  # grows while it is read
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += map(int, children.read_text().split())
            except OSError:
                continue  # ended meanwhile
    return found


def _number_after(key: str, pid: int, name: str) -> int:
    return next((int(line.split()[1]) for line in _read(pid, name).splitlines() if line.startswith(key)), 0)


def _read(pid: int, name: str) -> str:
    try:
        return Path(f"/proc/{pid}/{name}").read_text()
    except OSError:
        return ""  # ended meanwhile
