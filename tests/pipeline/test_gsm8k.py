"""The GSM8K how-to (examples/gsm8k/README.md) as written, on the real problems, or on made ones in their form without them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.public_data import best_math_kind, math_file


def test_grpo_runs_over_gsm8k(runs, tmp_path: Path) -> None:
    problems = math_file(best_math_kind(), tmp_path)
    tokenizer = [
        sys.executable, "tools/train_tokenizer.py", "--input", str(problems), "--field", "question", "--field", "answer",
        "--vocab-size", "2048", "--template", "r1_zero", "--out", str(tmp_path / "tokenizer"),
    ]  # fmt: skip
    done = subprocess.run(tokenizer, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    command = [
        sys.executable, "-m", "megatron_r1.cli", "grpo", "--config", "examples/gsm8k/grpo.yaml", f"data.source={problems}",
        f"data.tokenizer={tmp_path / 'tokenizer'}", f"run_dir={tmp_path / 'run'}", "grpo.rollouts=2", "evaluate.problems=4",
    ]  # fmt: skip
    runs.finish(command, tmp_path / "log.txt")
    lines = runs.read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == [0, 1, 2] and lines[1]["logprob_diff/max"] < 1e-2
    rollouts = [json.loads(line) for line in (tmp_path / "run/rollouts/step_000001.jsonl").read_text().splitlines()]
    questions = {json.loads(line)["question"] for line in problems.read_text(encoding="utf-8").splitlines()}
    assert {rollout["question"] for rollout in rollouts} <= questions and len({r["prompt_id"] for r in rollouts}) == 8
