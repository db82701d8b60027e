"""What the benchmarks of kills and faults compare: content, and nothing that a clock measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from benchmarks.recipe_kills import hashes
from benchmarks.slurm_campaign import differences
from megatron_r1.runtime import files, inputs
from megatron_r1.runtime.inputs import NOTES
from tests.slurm.jobs import read_metrics


def test_inputs_are_compared_by_content_and_not_by_when_they_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "FRESH_NANOSECONDS", 0)
    found = {}
    for name, content, age in (("early", "1", 1000.0), ("late", "1", 0.0), ("other", "2", 1000.0)):
        folder = tmp_path / name
        (folder / "run").mkdir(parents=True)
        monkeypatch.chdir(folder)
        Path("data.txt").write_text(content)
        os.utime("data.txt", (time.time() - age,) * 2)
        inputs.compare_inputs(folder / "run", {"data.source": "data.txt"}, None)
        found[name] = hashes(folder / "run")[NOTES]
    assert Path(tmp_path, "early/run", NOTES).read_bytes() != Path(tmp_path, "late/run", NOTES).read_bytes()
    assert found["early"] == found["late"] != found["other"]


def test_metrics_of_two_runs_differ_in_numbers_and_not_in_times(tmp_path: Path) -> None:
    for name, loss, idle in (("a", 0.5, 0.1), ("b", 0.5, 0.2), ("c", 0.25, 0.1)):
        (tmp_path / name).mkdir()
        line = f'{{"step": 1, "loss": {loss}, "rollout/idle": {idle}, "seconds/train": {idle}}}\n'
        (tmp_path / name / "metrics.jsonl").write_text(line)
    a, b, c = (read_metrics(tmp_path / name) for name in "abc")
    assert list(differences(a, b, 0.0)) == []
    assert list(differences(a, c, 0.0)) == ["step 1 loss: 0.25 instead of 0.5"]
