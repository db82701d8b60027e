"""Reads one run, or the runs of a pipeline, from a folder for a report."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError
from megatron_r1.runtime.metrics import read_metrics


@dataclass(frozen=True)
class RunRecord:
    """One run as it was recorded."""

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
    made = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return RunRecord(
        name=folder.name,
        command=made["command"],
        started=made["started"],
        metrics=read_metrics(folder / "metrics.jsonl"),
        config=(folder / "config.yaml").read_text(encoding="utf-8"),
        rollout_files=sorted((folder / "rollouts").glob("step_*.jsonl")),
    )
