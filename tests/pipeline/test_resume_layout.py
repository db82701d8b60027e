"""A run that is started again with another number of processes and another layout goes on where it was."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def test_two_expert_parallel_processes_then_one(runs, tmp_path: Path) -> None:
    settings = ["pretrain.steps=8", "pretrain.checkpoint_interval=3", "pretrain.micro_batch_size=8"]
    first, then, log = tmp_path / "first", tmp_path / "then", tmp_path / "log.txt"
    runs.finish(runs.command("pretrain", first, *settings, "parallel.ep=2", processes=2), log)
    assert sorted(path.name for path in (first / "checkpoints").iterdir()) == ["step_000006", "step_000008"]

    shutil.copytree(first, then)
    shutil.rmtree(then / "hf")
    shutil.rmtree(then / "checkpoints" / "step_000008")
    runs.finish(runs.command("pretrain", then, *settings), log)
    assert f"resuming {then} after step 6" in log.read_text()
    expected, lines = runs.read_metrics(first), runs.read_metrics(then)
    assert lines[:6] == expected[:6]
    for line, want in zip(lines[6:], expected[6:], strict=True):
        assert line["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert line["lr"] == want["lr"]
