"""Reads one run, or the runs of a pipeline, from a folder for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError, one_line
from megatron_r1.runtime.metrics import read_metrics
from megatron_r1.runtime.rollout_files import list_rollouts

_LARGEST = 1 << 60


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded."""

    folder: Path
    name: str
    command: str
    started: str  #: UTC, ISO 8601
    metrics: list[dict[str, Any]]  #: one per step
    config: str  #: config.yaml as text
    rollout_files: list[Path]  #: oldest first


def find_runs(folder: Path) -> list[RunRecord]:
    """The run in `folder`, and those in the folders right under it, in the order in which they were started.

    Raises DataError if there is none.
    """
    candidates = [folder, *(path for path in folder.glob("*") if path.is_dir())] if folder.is_dir() else []
    runs = [_read_run(path) for path in candidates if (path / "run.json").is_file()]
    if not runs:
        raise DataError(f"{folder} holds no run (no run.json in it or in a folder right under it): give the run_dir of a command")
    return sorted(runs, key=lambda run: run.started)


def _read_run(folder: Path) -> RunRecord:
    try:
        made = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        command, started = made["command"], datetime.fromisoformat(made["started"]).isoformat()
        if not isinstance(command, str):
            raise TypeError("the command is no text")
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{folder / 'run.json'} does not say what made this run ({one_line(error)})") from None
    try:
        config = (folder / "config.yaml").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{folder / 'config.yaml'} cannot be read: {one_line(error)}") from None
    return RunRecord(
        folder=folder,
        name=folder.name,
        command=command,
        started=started,
        metrics=_numbers_of(folder / "metrics.jsonl"),
        config=config,
        rollout_files=list_rollouts(folder),
    )


def _numbers_of(path: Path) -> list[dict[str, Any]]:
    """The metrics, every value a number that can be drawn, or None."""
    records = read_metrics(path)
    for number, record in enumerate(records, start=1):
        for name, value in record.items():
            if value is not None and (not isinstance(value, (int, float)) or (isinstance(value, int) and abs(value) > _LARGEST)):
                raise DataError(f"{path} line {number}: {name[:100]!r} is not a number that can be drawn: remove the line")
    return records
