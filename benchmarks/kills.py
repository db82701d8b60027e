"""What the benchmarks that kill a command share: starting it, waiting until nothing of it is left, and comparing what it made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.processes import ROOT, CommandFailed
from megatron_r1.runtime.launch import child_environment

NOT_COMPARED = ("checkpoints", "tensorboard", "health")  # folders: working state, and times
TIMED = ("metrics.jsonl", "ranks.jsonl", "run.json", "report.html")  # files that hold times
BY_ARRIVAL = ("answers.jsonl",)  # files whose lines stand in the order in which a served model answered
_DEAD_SECONDS = 60.0  # until nothing of a killed command may run any more


def start_command(command: Sequence[str], folder: Path, log: Path, **variables: str) -> subprocess.Popen:
    """A command as a user starts it, in a process group of its own."""
    environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables})
    with log.open("ab") as output:
        return subprocess.Popen(
            command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_until_dead(process: subprocess.Popen, folder: Path) -> None:
    """After a kill: wait until nothing works in the command's folder any more.

    Raises:
        CommandFailed: something outlives the command.
    """
    process.wait()
    end = time.monotonic() + _DEAD_SECONDS
    while left := working_in(folder):
        if time.monotonic() > end:
            raise CommandFailed(f"{_DEAD_SECONDS:.0f} s after the command was killed its processes {left} still run")
        time.sleep(0.2)


def working_in(folder: Path) -> list[int]:
    """Processes whose current folder it is; those of a command are told by it whatever group they have put themselves in."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if Path(os.readlink(entry / "cwd")) == folder:
                    found.append(int(entry.name))
            except OSError:
                continue  # ended meanwhile, or a zombie
    return found


def last_line(log: Path) -> str:
    """Of what a command printed."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def hashes(folder: Path) -> dict[str, str]:
    """Of all files that may not depend on when the run was killed."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        compared = path.is_file() and path.suffix in (".json", ".jsonl", ".safetensors", ".md") and path.name not in TIMED
        if compared and not set(NOT_COMPARED) & set(name.parts):
            content = path.read_bytes()
            if path.name in BY_ARRIVAL:
                content = b"".join(sorted(content.splitlines(keepends=True)))
            if path.name == "store.json":  # says when its sources were written, in ns
                content = re.sub(rb"\b1[0-9]{18}\b", b"", content)
            if path.name == "inputs.json":
                content = _without_times(content)
            found[str(name)] = hashlib.sha256(content).hexdigest()
    return found


def _without_times(inputs: bytes) -> bytes:
    """`inputs.json` with paths, sizes and checksums alone: the rest says when the files were written."""
    notes = json.loads(inputs)
    for note in notes.values():
        note["files"] = {name: [size, checksum] for name, (size, _, _, checksum) in note["files"].items()}
    return json.dumps(notes, sort_keys=True).encode()


def differing(wanted: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """Names that only one has, or whose values differ."""
    return sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))


def differences(wanted: Sequence[dict[str, float]], found: Sequence[dict[str, float]], close: float) -> Iterator[str]:
    """What is not the same in the metrics of two runs.

    Args:
        close: by how much two numbers may differ, relative to the larger or to 1.
    """
    if [line["step"] for line in wanted] != [line["step"] for line in found]:
        yield f"steps {[line['step'] for line in found]} instead of {[line['step'] for line in wanted]}"
        return
    for before, after in zip(wanted, found, strict=True):
        for name in before.keys() | after.keys():
            a, b = before.get(name), after.get(name)
            if a != b and not (None not in (a, b) and abs(a - b) <= close * max(1.0, abs(a), abs(b))):
                yield f"step {before['step']} {name}: {b} instead of {a}"
