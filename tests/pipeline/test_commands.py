"""The other commands, end to end: the pipeline's comparison, supervised fine-tuning, evaluation, a base that fails its gate."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.data.tally.arithmetic import chain_of_thought, draw_problem
from megatron_r1.pipeline.artifact import Artifact
from megatron_r1.runtime import distributed


def test_pipeline_compares_base_and_r1_zero(pipeline_run: Path) -> None:
    rows = json.loads((pipeline_run / "summary.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["base", "R1-Zero"]
    lines = [json.loads(line) for line in (pipeline_run / "r1_zero/metrics.jsonl").read_text().splitlines()]
    for row, line in zip(rows, (lines[0], lines[-1]), strict=True):
        assert row["pass_at_1"] == line["eval/pass@1"] and row["format"] == line["eval/format"]
    assert "pass@1" in (pipeline_run / "summary.md").read_text()
    assert (pipeline_run / "report.html").stat().st_size > 10_000


def test_artifact_names_its_inputs_and_notices_a_change(pipeline_run: Path, tmp_path: Path) -> None:
    manifest = json.loads((pipeline_run / "r1_zero/hf/artifact.json").read_text())
    base = json.loads((pipeline_run / "base/hf/artifact.json").read_text())
    assert manifest["stage"] == "grpo" and manifest["inputs"]["model.weights"]["sha256"] == base["sha256"]
    Artifact(pipeline_run / "base/hf").verify()


def test_sft_learns_its_pairs_and_evaluate_measures_it(capfd, base: Path, runs, tmp_path: Path) -> None:
    rng = random.Random(0)
    problems = [draw_problem(rng, heldout=False, heldout_fraction=0.1) for _ in range(256)]
    pairs = [
        {"prompt": p.question, "response": f"<think>{chain_of_thought(rng, p)[0]}</think><answer>{p.answer}</answer>"}
        for p in problems
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs))
    settings = ["--config", str(runs.CONFIG), f"model.weights={base / 'hf'}", "evaluate.problems=32", "evaluate.samples=2"]
    sft = [f"data.source={tmp_path / 'pairs.jsonl'}", "sft.epochs=3", "sft.batch_size=32", "sft.optimizer.lr=1e-3"]
    assert cli.main(["sft", *settings, f"run_dir={tmp_path / 'sft'}", *sft]) == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "sft/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 24 and losses[-1] < 0.9 * losses[0]
    assert cli.main(["evaluate", *settings, f"model.weights={tmp_path / 'sft'}", f"run_dir={tmp_path / 'evaluation'}"]) == 0
    measured = json.loads((tmp_path / "evaluation/evaluation.json").read_text())
    summary = json.loads((base.parent / "summary.json").read_text())["rows"][0]
    assert measured["format"] > summary["format"] + 0.3
    assert "greedy accuracy" in capfd.readouterr().out


def test_base_that_fails_its_gate_is_not_trained_further(capfd, monkeypatch, tmp_path: Path, runs) -> None:
    monkeypatch.setattr(distributed, "_STORE", None)  # a command is a process: forget where ranks met before
    arguments = ["pipeline", "r1-zero", "--config", str(runs.CONFIG), f"run_dir={tmp_path / 'run'}", "pretrain.steps=4"]
    arguments += ["pretrain.gate_extra_steps=2", "pretrain.gate_max_extra=1", "pretrain.gate_problems=8"]
    assert cli.main(arguments) == 1
    assert "pretrain.gate_accuracy=0.98 after 6 steps" in capfd.readouterr().err
    gates = [json.loads(line).get("gate/accuracy") for line in (tmp_path / "run/base/metrics.jsonl").read_text().splitlines()]
    assert [gate is not None for gate in gates] == [False, False, False, True, False, True]
    assert not (tmp_path / "run/r1_zero").exists() and not (tmp_path / "run/base/hf").exists()


@pytest.mark.parametrize("command", ["pretrain", "sft", "grpo", "evaluate", "report", "doctor", "pipeline r1-zero"])
def test_help(capsys, command: str) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0 and command.split()[-1] in capsys.readouterr().out
