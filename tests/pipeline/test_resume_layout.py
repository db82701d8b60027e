"""A run that is started again with another number of processes and another layout goes on where it was, on a blend of sources."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megatron_r1.cli import main
from megatron_r1.data.fill_in_middle import MARKS
from tests.token_sources import tally_blend, with_tokens


def test_two_expert_parallel_processes_then_one(runs, tmp_path: Path, capsys) -> None:
    # Two data-parallel ranks, and from step 5 on two that share a sequence, where there is one sequence less than ranks.
    yarn = "rope_scaling: {type: yarn, factor: 4.0, original_max_position_embeddings: 64}"
    sources = f"[{tmp_path / 'few'}, {{path: {tmp_path / 'many'}, weight: 1}}]"  # the other way round, and equal weights
    longer = f"updates: 4, sequence_length: 128, global_batch_size: 1, blend: {sources}, {yarn}"
    phases = [f"pretrain.phases=[{{updates: 4}}, {{{longer}, cp: {cp}}}]" for cp in ("2", "null")]
    settings = ["pretrain.checkpoint_interval=3", "pretrain.micro_batch_size=8", "pretrain.mask_documents=false"]
    settings += [
        *tally_blend(tmp_path, tokenizer=with_tokens(*MARKS[0])),
        "pretrain.fill_in_middle_rate=0.3",
        "model.overrides.vocab_size=452",
    ]
    settings += ["pretrain.validation.interval=4", "pretrain.validation.batches=1"]
    first, then, log = tmp_path / "first", tmp_path / "then", tmp_path / "log.txt"
    assert main(runs.command("build-index", first, *settings, phases[0])[3:]) == 0
    assert f"{first / 'index'}: 64 rows of 64 tokens, 4 rows of 128 tokens, " in capsys.readouterr().out
    indices = {path: path.stat().st_mtime_ns for path in (first / "index").rglob("*.npy")}
    runs.finish(runs.command("pretrain", first, *settings, phases[0], "parallel.ep=2", processes=2), log)
    assert {path: path.stat().st_mtime_ns for path in (first / "index").rglob("*.npy")} == indices, "what was built ahead is used"
    assert sorted(path.name for path in (first / "checkpoints").iterdir()) == ["step_000006", "step_000008"]

    shutil.copytree(first, then)
    shutil.rmtree(then / "hf")
    shutil.rmtree(then / "checkpoints" / "step_000008")
    runs.finish(runs.command("pretrain", then, *settings, phases[1]), log)
    assert f"resuming {then} after step 6" in log.read_text()
    expected, lines = runs.read_metrics(first), runs.read_metrics(then)
    assert [line["phase"] for line in lines] == [0] * 4 + [1] * 4
    assert lines[:6] == expected[:6]
    for line, want in zip(lines[6:], expected[6:], strict=True):
        assert line["loss"] == pytest.approx(want["loss"], abs=1e-5)
        assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=1e-4)
        assert line["lr"] == want["lr"]
    for name in ("many", "few"):
        losses = [line.get(f"validation/{name}/loss") for line in expected]
        assert [step for step, loss in enumerate(losses, 1) if loss is not None] == [4, 8]
        assert lines[7][f"validation/{name}/loss"] == pytest.approx(losses[7], abs=1e-5)

    capsys.readouterr()
    assert main(["show-samples", str(then), "4"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("--- row 48, token 0: ") == 1 and "--- row 63, " in shown and "--- row 64, " not in shown
    assert shown.count(f"{tmp_path / 'many'}, document ") > shown.count(f"{tmp_path / 'few'}, document ") > 0
    assert "A conversation between User and Assistant." in shown
    assert main(["show-samples", str(then), "8"]) == 0
    shown_last = capsys.readouterr().out
    assert shown_last.count("--- row 3, token 0: ") == 1 and all(mark in shown + shown_last for mark in MARKS[0])
    noted = json.loads((first / "hf" / "artifact.json").read_text())
    assert "pretrain.phases.1.blend.0.idx" in json.dumps(noted)
    assert main(["show-samples", str(then), "9"]) == 2
