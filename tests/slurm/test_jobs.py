"""Real jobs over two nodes, as short as they can be: a signal, a rank that hangs, a bad node.

More faults are in `python -m benchmarks.slurm_faults`.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections.abc import Iterator

import pytest

from benchmarks.processes import serve_rules
from megatron_r1.model.presets import PRESETS
from megatron_r1.report.status import describe_status
from tests.patience import patient
from tests.slurm.jobs import LOST_SECONDS, PRETRAIN, QUICK, ROOT, Jobs, read_metrics


@pytest.fixture(scope="module")
def judge() -> Iterator[str]:
    """The stand-in for a served judge; its URL."""
    with serve_rules() as url:
        yield url


def test_stage_4_over_two_nodes_saves_at_a_signal_is_requeued_and_ends(jobs: Jobs, judge: str) -> None:
    run = jobs.folder / "stage4"
    job = jobs.submit(
        "r1_stage4",
        f"run_dir={run}",
        f"reward.judge.url={judge}",
        "checkpoint.interval=100",
        config="examples/tiny_cpu/stage4.yaml",
    )
    jobs.wait_for_step(job, run, 1, 200)
    for node in ("n1", "n2"):
        assert len(jobs.ranks("grpo", node)) == len(jobs.engines(node)) == 1
    assert "running" in describe_status(run) and "2 of 2 ranks seen" in describe_status(run)
    jobs.cluster.run("scancel", "--signal=USR1", job)
    log = jobs.finish(job, 300)
    stopped = re.search(r"SIGUSR1: stopped after step (\d) of 4, which is saved", log)
    assert stopped, log
    assert f"resuming {run} after step {stopped[1]}" in log and jobs.cluster.job(job)["Restarts"] == "1"
    metrics = read_metrics(run)
    assert [line["step"] for line in metrics] == [0, 1, 2, 3, 4]
    assert max(line.get("logprob_diff/mean", 0) for line in metrics) < 1e-4
    rollouts = [json.loads(line) for line in (run / "rollouts/step_000004.jsonl").read_text().splitlines()]
    assert len(rollouts) == 32 and (run / "engine_00001.log").exists()
    assert (run / "scoring.log").exists() and (run / "scoring_00001.log").exists(), "each rank scores what its engine samples"
    idle = [json.loads(line)["rollout/idle"] for line in (run / "metrics.jsonl").read_text().splitlines()[1:]]
    assert idle and all(0 <= share < 1 for share in idle)
    assert sorted(path.name for path in jobs.job_folder(job).glob("rank_*.log")) == ["rank_0000.log", "rank_0001.log"]
    assert "finished" in describe_status(run)


def test_a_heterogeneous_job_trains_on_one_node_and_samples_on_the_other(jobs: Jobs, judge: str) -> None:
    run = jobs.folder / "stage4"
    options = ("--nodes=1", "--ntasks-per-node=1", "--cpus-per-task=1", ":", "--nodes=1")
    settings = ("grpo.rollouts=1", "evaluate.problems=2", f"reward.judge.url={judge}")
    job = jobs.submit("r1_stage4", f"run_dir={run}", *settings, options=options, config="examples/tiny_cpu/stage4.yaml")
    jobs.wait_for_step(job, run, 0, 120)
    assert len(jobs.ranks("grpo", "n1")) == len(jobs.ranks("serve-rollouts", "n2")) == len(jobs.engines("n2")) == 1
    assert not jobs.engines("n1")
    jobs.finish(job, 120)
    assert [line["step"] for line in read_metrics(run)] == [0, 1]
    assert read_metrics(run)[1]["logprob_diff/mean"] < 1e-4


def test_r1_sh_pretrains_and_then_runs_r1_zero_with_one_engine_over_both_nodes(jobs: Jobs, judge: str) -> None:
    """The first two jobs of the chain; the third begins when they have ended. The whole chain: `slurm_faults --only chain`."""
    run = jobs.folder / "r1"
    settings = (
        f"run_dir={run}", f"reward.judge.url={judge}", "pretrain.steps=20", "pretrain.micro_batch_size=8",
        "pretrain.gate_accuracy=0",
        "recipe.gates={}", "recipe.measured_problems=4", "recipe.measured_samples=1", "recipe.measured_requests=2",
        "recipe.stages.zero.grpo.rollouts=1", "grpo.prompts_per_rollout=4", "grpo.group_size=4", "grpo.minibatch_size=16",
        "rollout.placement=colocated", "rollout.tensor_parallel_size=2", "rollout.nodes_per_engine=2",
    )  # fmt: skip
    variables = {
        "RECIPE": "examples/tiny_cpu/r1.yaml",
        "R1_SITE": str(jobs.site),
        "R1_SBATCH_OPTIONS": f"--nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --output={jobs.logs}/%j.out",
    }
    graph = jobs.cluster.run("bash", "slurm/r1.sh", *settings, cwd=ROOT, **variables)
    ids = dict(re.findall(r"^(\S+) +job (\d+)", graph, re.MULTILINE))
    jobs.finish(ids["pretrain"], 120)
    assert jobs.cluster.state(ids["r1_stage1"]) == "PENDING"
    jobs.wait_for_step(ids["r1_zero"], run / "zero", 1, 200)
    assert len(jobs.engines("n1")) == len(jobs.engines("n2")) == 1
    jobs.finish(ids["r1_zero"], 120)
    (before, after) = read_metrics(run / "zero")
    assert after["logprob_diff/mean"] < 1e-4 and before["step"] == 0
    jobs.cluster.wait(lambda: jobs.cluster.state(ids["r1_stage1"]) == "RUNNING", 60, "the third job", jobs.log(ids["r1_stage1"]))


def test_a_stopped_rank_is_found_its_stacks_are_written_and_the_job_goes_on(jobs: Jobs) -> None:
    run = jobs.folder / "pretrain"
    job = jobs.submit("pretrain", f"run_dir={run}", *PRETRAIN, *QUICK, config="examples/tiny_cpu/r1_zero.yaml")
    jobs.wait_for_step(job, run, 12, 120)
    (frozen,) = jobs.ranks("pretrain", "n2")
    os.kill(frozen, signal.SIGSTOP)
    began = time.monotonic()
    jobs.cluster.wait(lambda: (run / "health/abort.json").exists(), LOST_SECONDS + 15, "notice of the stopped rank", jobs.log(job))
    assert time.monotonic() - began < LOST_SECONDS + patient(5)
    log = jobs.finish(job, 200)
    assert f"rank 1 (node n2, process {frozen}) gave no sign for" in log and "requeued" in log
    assert re.search(rf"resuming {run} after step [1-4]?[05]\b", log)
    assert all("Thread" in (run / f"health/stacks_rank_{rank:05d}.txt").read_text() for rank in (0, 1))
    assert [line["step"] for line in read_metrics(run)] == list(range(1, 51))


def test_a_bad_node_is_named_and_excluded_and_the_job_begins_elsewhere(jobs: Jobs) -> None:
    scratch, model = jobs.folder / "scratch", jobs.folder / "config.json"
    (scratch / "n2").mkdir(parents=True)  # n1 has no local disk
    model.write_text(json.dumps(PRESETS["tiny"].to_hf_config(0, 1, "float32")))
    site = Jobs(jobs.cluster, jobs.folder, R1_PREFLIGHT="1", R1_SCRATCH=f"{scratch}/{{node}}", R1_PREFLIGHT_SLOWEST="0.01")
    jobs.cluster.run("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        job = site.submit("convert", "dry-run", "--config", str(model), config="", options=("--nodes=1",))
        jobs.cluster.wait(lambda: jobs.cluster.job(job).get("ExcNodeList") == "n1", 90, "exclusion of n1", jobs.log(job))
    finally:
        jobs.cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    log = jobs.finish(job, 90)
    assert f"preflight: n1 is bad: disk {scratch}/n1: No such file or directory" in log
    assert "preflight: n2 is well" in log and jobs.cluster.job(job)["BatchHost"] == "n2"
