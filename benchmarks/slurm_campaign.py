"""What the scenarios of slurm_faults.py share: a cluster, a base, the undisturbed run, and the comparison with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.kills import differences
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import QUICK, Jobs, read_metrics

CONFIG = "examples/tiny_cpu/stage4.yaml"
SETTINGS = (
    "grpo.rollouts=6",
    "checkpoint.interval=1",
    "rollout.stall_seconds=20",
    "rollout.dispatch=fixed",  # faults are compared to the bit
    "model.overrides={}",
    *QUICK,
)
BASE = ("pretrain.steps=150", "pretrain.micro_batch_size=8", "pretrain.mask_documents=true", "pretrain.optimizer.lr=4.0e-3")
TIMEOUT = 1200.0  # seconds for a job, with all its restarts
CLOSE = 1e-4  # relative; where an engine was replaced in mid-rollout the rest is sampled in smaller batches, which rounds otherwise


class Failed(Exception):
    """A scenario did not end as it must."""


class Campaign:
    """One cluster, one judge, one undisturbed run, and what is done to the others."""

    def __init__(self, cluster: Cluster, folder: Path, judge: str, kills: int, seed: int) -> None:
        self.cluster, self.folder, self.judge = cluster, folder, judge
        self.kills, self.random = kills, random.Random(seed)
        self.jobs = Jobs(cluster, folder, R1_MAX_FAILURES="50")
        self._wanted: list[dict[str, float]] | None = None
        self._base: Path | None = None

    def undisturbed(self) -> list[dict[str, float]]:
        """Metrics of the run to which nothing is done."""
        if self._wanted is None:
            job, run = self.start("undisturbed")
            self.jobs.finish(job, TIMEOUT)
            self._wanted = read_metrics(run)
        return self._wanted

    def base(self) -> Path:
        """A model whose rewards differ within a group, so that a lost or doubled group would be seen; it is no good one."""
        if self._base is None:
            run = self.folder / "base"
            self.jobs.finish(self.jobs.submit("pretrain", f"run_dir={run}", *BASE, config=CONFIG), TIMEOUT)
            self._base = run / "hf"
        return self._base

    def start(
        self, name: str, *settings: str, options: Sequence[str] = ("--nodes=2",), run: Path | None = None
    ) -> tuple[str, Path]:
        """Submit stage 4; returns job and run folder."""
        run = run or self.folder / name
        arguments = (f"run_dir={run}", f"model.weights={self.base()}", f"reward.judge.url={self.judge}", *SETTINGS, *settings)
        return self.jobs.submit("r1_stage4", *arguments, options=tuple(options), config=CONFIG), run

    def finish(self, job: str, run: Path, restarts: int | None = None, exactly: bool = True) -> str:
        """Wait for the end, compare the metrics, and tell what was seen."""
        self.jobs.finish(job, TIMEOUT)
        seen = int(self.cluster.job(job)["Restarts"])
        if restarts is not None and seen != restarts:
            raise Failed(f"{seen} restarts instead of {restarts}; see {self.jobs.log(job)}")
        different = list(differences(self.undisturbed(), read_metrics(run), 0.0 if exactly else CLOSE))
        if different:
            raise Failed(f"metrics differ: {'; '.join(different[:3])}; see {run}")
        return f"{seen} restart(s), metrics {'the same' if exactly else f'the same within {CLOSE:g}'}"

    def when(self, job: str, condition: Callable[[], bool], what: str) -> None:
        """Wait for the moment at which something is done to a job."""
        self.cluster.wait(condition, 400, what, self.jobs.log(job))

    def ranks(self, node: str | None = None) -> list[int]:
        """Processes of the trainers' ranks."""
        return self.jobs.ranks("grpo", node)
