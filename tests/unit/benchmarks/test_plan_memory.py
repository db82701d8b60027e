"""The comparison of planned and measured memory: its settings are a run's, its bar is held, its measure counts processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import yaml

from benchmarks import plan_memory
from benchmarks.plan_memory import MODELS, STAGES, Row, config_of, main, measure, predict, write_samples
from benchmarks.processes import CommandFailed


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_every_row_is_planned(model: str, stage: str, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(config_of(model, stage, tmp_path)))
    (rank, whole), (_, of_two) = predict(config, stage, 1), predict(config, stage, 2)
    assert 0.5e9 < rank <= whole < of_two < 40e9


def test_samples_are_longer_than_the_limit(tmp_path: Path) -> None:
    write_samples(tmp_path / "samples.jsonl", 3)
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(len(line) > 5 * 64 for line in lines)


@pytest.mark.parametrize(("measured", "code"), [(1.05e9, 0), (1.2e9, 1), (0.85e9, 1)])
def test_the_bar_is_held(measured: float, code: int, monkeypatch, capsys) -> None:
    monkeypatch.setattr(plan_memory, "compare", lambda *asked: [Row(*asked, "all", 1e9, measured)])
    monkeypatch.setattr(sys, "argv", ["plan_memory", "--models", "tiny", "--stages", "sft", "--ranks", "2"])
    assert main() == code
    out = capsys.readouterr().out
    assert f"{1 - code} of 1 numbers within 10%" in out and "tiny     sft           2 all" in out


def test_a_run_that_fails_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("nonsense: 1\n")
    with pytest.raises(CommandFailed, match=r"pretrain on 1 rank\(s\) ended with code 2: megatron-r1: error: "):
        measure(tmp_path / "config.yaml", "pretrain", 1, tmp_path / "log")
