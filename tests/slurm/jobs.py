"""The batch scripts of this project on a test's cluster: submitted as a user does, with the tiny CPU settings."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.paths import ROOT
from tests.patience import patient
from tests.slurm.cluster import Cluster
from tests.timed import TIMES

SLURM = ROOT / "slurm"
SCRIPTS = sorted(SLURM.glob("*.sbatch"))
#: What the test's nodes have instead of 8 GPUs, and how long a rank may hang there.
SMALL = ("--ntasks-per-node=1", "--cpus-per-task=1")
LOST_SECONDS = patient(15)
QUICK = ("runtime.heartbeat.interval_seconds=1", f"runtime.heartbeat.lost_seconds={LOST_SECONDS:.0f}")
PRETRAIN = (
    "pretrain.steps=50", "pretrain.micro_batch_size=8", "pretrain.gate_accuracy=0.0", "pretrain.checkpoint_interval=5",
    "checkpoint.asynchronous=false",
)  # fmt: skip


class Jobs:
    """Submits into one cluster.

    Args:
        folder: takes logs and run folders.
    """

    def __init__(self, cluster: Cluster, folder: Path, **site: str) -> None:
        self.cluster, self.folder = cluster, folder
        self.logs = folder / "logs"
        self.logs.mkdir(parents=True, exist_ok=True)
        self.site = folder / "site.env"
        settings = {"R1_PYTHON": sys.executable, "R1_LOGS": str(self.logs), "R1_PREFLIGHT": "0", "R1_PLAN": "0", **site}
        self.site.write_text("".join(f"{name}={value!r}\n" for name, value in settings.items()))

    def submit(self, script: str, *arguments: str, options: tuple[str, ...] = ("--nodes=2",), config: str, **variables: str) -> str:
        """sbatch of one of the project's files; returns the job's id."""
        return self.cluster.submit(
            f"--output={self.logs}/%j.out", *options, *SMALL, f"slurm/{script}.sbatch", *arguments,
            cwd=ROOT, CONFIG=config, R1_SITE=str(self.site), **variables,
        )  # fmt: skip

    def log(self, job: str) -> Path:
        """What the batch script printed: its own lines and rank 0's."""
        return self.logs / f"{job}.out"

    def job_folder(self, job: str) -> Path:
        """Where the ranks' logs are."""
        return next(path for path in self.logs.glob(f"*-{job}") if path.is_dir())

    def ranks(self, command: str, node: str | None = None) -> list[int]:
        """Processes of the ranks that run a command of ours, on one node or on both."""
        return self.cluster.processes(f"{sys.executable} -m megatron_r1.cli {command}", node)

    def engines(self, node: str | None = None) -> list[int]:
        """Processes of vLLM engines."""
        return self.cluster.processes(f"{sys.executable} -m megatron_r1.rollout.vllm.main", node)

    def finish(self, job: str, timeout: float) -> str:
        """Wait for the job's good end; returns its log."""
        self.cluster.finish(job, timeout, self.log(job))
        return self.log(job).read_text()

    def wait_for_step(self, job: str, run: Path, step: int, timeout: float) -> None:
        """Wait until a run has recorded a step."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
        self.cluster.wait(
            lambda: last_step(run) >= step or self.cluster.state(job) in ended, timeout, f"step {step} of {run}", self.log(job)
        )
        assert last_step(run) >= step, self.log(job).read_text()[-3000:]


def last_step(run: Path) -> int:
    """The last step that is recorded, -1 where there is none."""
    path = run / "metrics.jsonl"
    lines = [line for line in path.read_text().split("\n")[:-1] if line] if path.exists() else []
    return json.loads(lines[-1])["step"] if lines else -1


def read_metrics(run: Path) -> list[dict[str, float]]:
    """metrics.jsonl without what a clock measured."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.startswith(TIMES)} for line in lines]


def python_path() -> str:
    """For programs that a test starts beside the jobs."""
    return os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
