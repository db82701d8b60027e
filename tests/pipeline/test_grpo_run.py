"""What a GRPO run leaves behind, and that one killed at any moment ends up as if nothing had happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.patience import wait_until

KEYS = [
    "step", "reward/mean", "reward/accuracy", "reward/format", "response_length/mean", "kl/reference", "ratio/clipped_fraction",
    "logprob_diff/mean", "logprob_diff/max", "grad_norm", "tokens_per_second/rollout", "tokens_per_second/train", "seconds/rollout",
    "seconds/reward", "seconds/logprob", "seconds/train", "seconds/sync",
]  # fmt: skip


def test_metrics_have_every_key_and_the_engine_agrees_with_the_trainer(finished_run: Path) -> None:
    lines = [json.loads(line) for line in (finished_run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5, 6]
    for line in lines[1:]:
        assert [key for key in KEYS if key not in line] == []
        assert line["logprob_diff/mean"] < 1e-4 and line["logprob_diff/max"] < 1e-2
    assert ["eval/pass@1" in line and "eval/format" in line for line in lines] == [True, False, False, True, False, False, True]
    assert lines[-1]["updates"] == 12
    assert min(line["grad_norm"] for line in lines[1:4]) > 1e-2, "no reward differed: this run would show nothing"


def test_run_folder_holds_what_it_promises(finished_run: Path) -> None:
    for name in (
        "config.yaml",
        "report.html",
        "hf/config.json",
        "hf/tokenizer.json",
        "hf/artifact.json",
        "checkpoints/step_000006/COMPLETE",
        "checkpoints/step_000006/config.json",
        "checkpoints/step_000006/tokenizer.json",
    ):
        assert (finished_run / name).is_file(), name
    assert list((finished_run / "tensorboard").glob("events.*"))
    assert sorted(p.name for p in (finished_run / "checkpoints").glob("step_*")) == ["step_000004", "step_000006"]
    rollouts = [json.loads(line) for line in (finished_run / "rollouts/step_000001.jsonl").read_text().splitlines()]
    assert len(rollouts) == 64 and {"prompt_id", "response", "reward", "advantage", "finished"} <= rollouts[0].keys()


def test_no_prompt_comes_twice(finished_run: Path, runs) -> None:
    ids = [prompt for step in runs.read_prompts(finished_run) for prompt in dict.fromkeys(step)]
    assert len(ids) == len(set(ids)) == 48


def test_run_that_is_killed_and_loses_a_checkpoint_goes_on_as_if_nothing_had_happened(
    finished_run: Path, base: Path, runs, tmp_path: Path
) -> None:
    """Killed before the first checkpoint and between two, the newer of which is then damaged: one run goes through all of it.

    Its training state is off the device while the engine samples, and when checkpoints are written.
    """
    folder, log = tmp_path / "killed", tmp_path / "log.txt"
    command = runs.grpo_command(folder, base, "runtime.offload=[optimizer,gradients,reference]")
    metrics, checkpoints = folder / "metrics.jsonl", folder / "checkpoints"
    kill_when(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= 2, runs.start(command, log), log)
    assert not list(checkpoints.glob("step_*"))
    kill_when((checkpoints / "step_000004" / "COMPLETE").exists, runs.start(command, log), log)
    assert not (checkpoints / "step_000006").exists() and not (folder / "hf").exists()
    assert "resuming" not in log.read_text()
    damaged = next((checkpoints / "step_000004" / "policy").glob("*.distcp"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)

    runs.finish(command, log)
    assert f"corrupt checkpoint: {damaged} has other content than was written" in log.read_text()
    assert f"resuming {folder} after step 2" in log.read_text()
    assert runs.read_metrics(folder) == runs.read_metrics(finished_run)
    assert runs.read_prompts(folder) == runs.read_prompts(finished_run)
    mine, theirs = (load_file(next((f / "hf").glob("*.safetensors"))) for f in (folder, finished_run))
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)


def kill_when(condition: Callable[[], bool], process: subprocess.Popen, log: Path) -> None:
    """SIGKILL to the run and its engine as soon as the condition holds."""

    def comes() -> bool:
        assert process.poll() is None, log.read_text()[-3000:]
        return condition()

    wait_until(comes, 300, "moment to kill it", pause=0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_finished_run_is_not_run_again(finished_run: Path, base: Path, runs, tmp_path: Path) -> None:
    before = (finished_run / "metrics.jsonl").stat().st_mtime_ns
    runs.finish(runs.grpo_command(finished_run, base), tmp_path / "log.txt")
    assert (finished_run / "metrics.jsonl").stat().st_mtime_ns == before
    assert "is finished" in (tmp_path / "log.txt").read_text()
