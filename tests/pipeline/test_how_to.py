"""The how-to pages about rewards and environments, followed as written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.followed_pages import follow_page, run_in_folder


def scored(folder: Path) -> list[tuple[float, str, str]]:
    lines = (folder / "scored.jsonl").read_text(encoding="utf-8").splitlines()
    return [(line["score"], line["outcome"], line["detail"]) for line in map(json.loads, lines)]


def test_a_reward_by_import_path_trains_the_tiny_model_and_resumes(base: Path, runs, tmp_path: Path) -> None:
    (tmp_path / "runs/quickstart/base").mkdir(parents=True)
    (tmp_path / "runs/quickstart/base/hf").symlink_to(base / "hf")
    follow_page("reward.md", tmp_path)
    assert scored(tmp_path) == [(1.0, "correct", ""), (pytest.approx(0.48), "wrong", "")]
    run = tmp_path / "runs/brevity"
    lines = runs.read_metrics(run)
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    for line in lines[1:]:
        assert 0 <= line["reward/brevity"] <= 1 and line["reward/outcome/brevity/error"] == 0.0
    rollout = json.loads((run / "rollouts/step_000001.jsonl").read_text().splitlines()[0])
    parts = rollout["reward_parts"]
    assert rollout["reward"] == pytest.approx(parts["accuracy"] + parts["format"] + 0.5 * parts["brevity"])
    assert min(line["grad_norm"] for line in lines[1:]) > 0

    shutil.rmtree(run / "hf")
    shutil.rmtree(run / "checkpoints/step_000004")
    assert "after step 2" in run_in_folder("megatron-r1 grpo --config train.yaml 2>&1", tmp_path)
    assert runs.read_metrics(run) == lines


def test_an_environment_of_ones_own_is_trained_on_and_evaluated(runs, tmp_path: Path) -> None:
    printed = follow_page("environment.md", tmp_path)
    assert scored(tmp_path) == [(1.0, "correct", "makes 10"), (0.0, "wrong", "other numbers")]
    lines = runs.read_metrics(tmp_path / "runs/countdown")
    assert [line["step"] for line in lines] == [0, 1, 2] and "reward/accuracy" in lines[1] and "reward/countdown" not in lines[1]
    assert "eval/pass@1" in lines[0] and "eval/pass@1" in lines[2]
    evaluation = json.loads((tmp_path / "runs/countdown_evaluated/evaluation.json").read_text())
    assert evaluation["problems"] == 8 and evaluation["unscored"] == 0.0 and "pass@1" in printed
