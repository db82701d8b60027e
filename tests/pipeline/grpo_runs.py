"""Small GRPO runs in processes of their own, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.patience import patient
from tests.timed import TIMES

CONFIG = ROOT / "examples/tiny_cpu/r1_zero.yaml"
SMALL = [
    "pretrain.steps=60",  # just enough for rewards that differ within a group
    "pretrain.gate_accuracy=0.0",
    "grpo.rollouts=6",
    "grpo.prompts_per_rollout=8",
    "grpo.group_size=8",
    "grpo.minibatch_size=32",
    "grpo.reference_update_interval=4",
    "evaluate.problems=8",
    "evaluate.samples=2",
    "evaluate.interval=3",
    "rollout.max_response_tokens=20",
    "checkpoint.interval=2",
]


def command(name: str, run_dir: Path, *overrides: str, processes: int = 1) -> list[str]:
    """The command line of one run with the small settings."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*launcher, "-m", "megatron_r1.cli", *name.split(), "--config", str(CONFIG), f"run_dir={run_dir}", *SMALL, *overrides]


def grpo_command(run_dir: Path, base: Path, *overrides: str, processes: int = 1) -> list[str]:
    """GRPO from the base in `base`."""
    return command("grpo", run_dir, f"model.weights={base / 'hf'}", *overrides, processes=processes)


def start(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own, so that a test can kill all of it."""
    with log.open("ab") as output:
        return subprocess.Popen(
            command, stdout=output, stderr=output, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), start_new_session=True
        )


def finish(command: list[str], log: Path) -> None:
    """Run to the end; the log is shown where it fails."""
    code = start(command, log).wait(timeout=patient(400))
    assert code == 0, log.read_text()[-3000:]


def read_metrics(run_dir: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def read_prompts(run_dir: Path) -> list[list[str]]:
    """Prompt ids of every step, in order."""
    files = sorted((run_dir / "rollouts").glob("step_*.jsonl"))
    return [[json.loads(line)["prompt_id"] for line in file.read_text().splitlines()] for file in files]
