"""The same GRPO job on two processes: every layout sees the first rollout as one process does, and agrees with the engine."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "layout", ["parallel.tp=2", "parallel.ep=2", "parallel.pp=2", "parallel.tp=1"], ids=["tp2", "ep2", "pp2", "dp2"]
)
def test_two_processes_train_like_one(finished_run: Path, base: Path, runs, tmp_path: Path, layout: str) -> None:
    offload = "runtime.offload=[optimizer,gradients]"  # the reference stays on the device
    runs.finish(runs.grpo_command(tmp_path / "run", base, layout, "grpo.rollouts=2", offload, processes=2), tmp_path / "log.txt")
    lines, expected = runs.read_metrics(tmp_path / "run"), runs.read_metrics(finished_run)
    # The same initial weights reach the engine bit by bit, so it samples the same responses.
    assert runs.read_prompts(tmp_path / "run")[0] == runs.read_prompts(finished_run)[0]
    for key in ("reward/mean", "response_length/mean", "entropy/sampled"):
        assert lines[1][key] == expected[1][key], key
    for key in ("loss", "grad_norm"):
        assert lines[1][key] == pytest.approx(expected[1][key], rel=1e-4, abs=1e-6), key
    assert lines[1]["ratio/max"] == pytest.approx(expected[1]["ratio/max"], rel=1e-3), "the largest over all ranks"
    for line in lines[1:]:
        assert line["logprob_diff/mean"] < 1e-4 and line["logprob_diff/max"] < 1e-2
