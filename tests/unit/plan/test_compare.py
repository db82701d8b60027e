"""A run's metrics beside its plan: a run that was as planned has no error, and what is missing is said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.plan.compare import TIMERS, compare_run, describe_comparison
from megatron_r1.plan.job import read_job
from megatron_r1.plan.memory import plan_memory, stage_phases
from megatron_r1.plan.stage_time import Assumed, plan_time

LENGTH = 700.0
SETTINGS = {
    "model": {"preset": "qwen2.5_1.5b"},
    "runtime": {"device": "cuda", "dtype": "bf16"},
    "rollout": {"max_response_tokens": 2048, "placement": "colocated", "engines_per_node": 8, "gpu_memory_utilization": 0.4},
    "grpo": {"prompts_per_rollout": 32, "micro_batch_tokens": 4096},
    "data": {"max_prompt_tokens": 512},
}


def write_run(run: Path, factor: float = 1.0, steps: int = 6, command: str = "grpo", with_memory: bool = True) -> None:
    """A run on one node of eight whose every figure is `factor` times what is planned; its first step took longer."""
    (run / "health").mkdir(parents=True)
    (run / "config.yaml").write_text(yaml.safe_dump(SETTINGS))
    (run / "run.json").write_text(json.dumps({"command": command, "started": "2026-11-30T00:00:00+00:00"}))
    for rank in range(8):
        sign = {"rank": rank, "world_size": 8, "host": "a", "node": "a", "pid": 1}
        (run / f"health/rank_{rank:05d}.json").write_text(json.dumps(sign))
    job = read_job(load_config(run / "config.yaml"), "grpo", "H100", world_size=8)
    time = plan_time(job, Assumed(response=LENGTH))
    assert time is not None
    planned = {f"seconds/{TIMERS[phase.name]}": phase.seconds for phase in time.phases if phase.name in TIMERS}
    planned |= {"seconds/step": time.seconds}
    if with_memory:
        for phase in stage_phases(job, 0, plan_memory(job).engine):
            own = [term.amount for term in phase.device if term.name not in ("CUDA, NCCL", "fragmentation", "engine")]
            own = [term.amount for term in phase.device if term.amount in own and not term.name.startswith("engine ")]
            timer = {"step": "train", "saving": "checkpoint"}.get(phase.name) or TIMERS[phase.name]
            planned[f"memory/{timer}"] = max(planned.get(f"memory/{timer}", 0.0), sum(own))
    records = [{"step": 0, "eval/pass@1": 0.5}]
    for step in range(1, steps + 1):
        slower = 10 if step == 1 else 1
        records.append({"step": step, "response_length/mean": LENGTH} | {k: v * factor * slower for k, v in planned.items()})
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("factor", (1.0, 1.25))
def test_every_figure_of_a_run_is_set_beside_the_plans(tmp_path: Path, factor: float) -> None:
    write_run(tmp_path / "run", factor)
    found = compare_run(tmp_path / "run", "H100")
    assert found.steps == 5 and (found.job.world_size, found.job.nodes, found.job.devices_per_node) == (8, 1, 8)
    rows = {row.phase: row for row in found.seconds}
    assert {"sampling", "log-probs", "update", "weight sync", "whole"} <= set(rows)
    for row in (*found.seconds, *found.memory):
        assert row.predicted and row.error == pytest.approx(1 / factor - 1, abs=1e-6), row
    assert {row.phase for row in found.memory} == {"rollout", "logprob", "train", "sync", "checkpoint"}
    text = describe_comparison(found)
    assert text.count(f"{1 / factor - 1:+.0%}") == len(rows) + len(found.memory) and "median of 5 steps" in text


def test_the_command_prints_it(tmp_path: Path, capsys) -> None:
    write_run(tmp_path / "run")
    assert main(["plan", "--compare", str(tmp_path / "run"), "--gpu", "H100"]) == 0
    out, _ = capsys.readouterr()
    assert "plan of grpo: 8 rank(s) on 1 node(s) of 8 H100" in out and "tensors of rank 0's device" in out
    assert main(["plan", "--compare", str(tmp_path), "grpo.group_size=4"]) == 2
    assert "leave --config and settings out" in capsys.readouterr().err


def test_a_run_without_memory_says_so(tmp_path: Path) -> None:
    write_run(tmp_path / "run", with_memory=False)
    found = compare_run(tmp_path / "run", "H100")
    assert all(row.measured is None and row.error is None for row in found.memory)
    assert "has recorded no memory/*" in describe_comparison(found)


def test_what_cannot_be_compared_is_one_line(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(DataError, match="is no run folder"):
        compare_run(run)
    write_run(run, steps=3)
    with pytest.raises(DataError, match="2 steps after its first, 3 are needed"):
        compare_run(run)
    (run / "run.json").write_text('{"command": "curate"}')
    with pytest.raises(ConfigError, match="'curate', which is not planned"):
        compare_run(run)
    (run / "run.json").write_text('{"command": "grpo"}')
    (run / "config.yaml").write_text("runtime: {device: cpu}\n")
    with pytest.raises(ConfigError, match="plan simulate --like"):
        compare_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(DataError, match=r"no config\.yaml"):
        compare_run(run)
