"""A finished run's metrics beside what a plan of it says: seconds of every phase, and the memory of its tensors."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any, cast

from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError, DataError, one_line
from megatron_r1.plan.job import STAGES, Job, Stage, read_job
from megatron_r1.plan.memory import plan_memory, stage_phases
from megatron_r1.plan.stage_time import Assumed, plan_time
from megatron_r1.plan.terms import MemoryPhase, TimePhase
from megatron_r1.runtime.heartbeat import FOLDER, Sign, read_sign
from megatron_r1.runtime.metrics import read_metrics

#: phase of a plan -> timer of metrics.jsonl
TIMERS = {
    "sampling": "rollout", "reward": "reward", "log-probs": "logprob", "update": "train", "weight sync": "sync",
    "save": "checkpoint",
}  # fmt: skip
#: Terms that are no tensors of the trainer's process, which alone `memory/*` counts.
_NOT_TENSORS = ("CUDA, NCCL", "fragmentation", "engine")
_STEPS = 3  # that a run must have after its first, which starts engines and compiles


@dataclass(frozen=True)
class ComparedFigure:
    """One figure of both sides."""

    phase: str
    measured: float | None  #: seconds or bytes; None: the run has not recorded it
    predicted: float | None  #: None: the plan has no such phase

    @property
    def error(self) -> float | None:
        """Relative, of the prediction."""
        return None if not self.measured or self.predicted is None else self.predicted / self.measured - 1


@dataclass(frozen=True)
class Comparison:
    """Of one run."""

    job: Job
    steps: int  #: that were measured
    seconds: list[ComparedFigure]
    memory: list[ComparedFigure]  #: of rank 0's device, bytes


def compare_run(run: Path, gpu: str | None = None, *, prompt: float | None = None) -> Comparison:
    """Plan what a run did, on as many ranks, with the mean length of its responses, and set it beside its metrics.

    Args:
        gpu: a name of `devices.DEVICES`; None: as `read_job`.
        prompt: tokens of a prompt in the mean; None: as `Assumed`.

    Raises:
        DataError: it is no run folder, or has too few steps.
        ConfigError: it ran on CPUs, or cannot be planned.
    """
    stage = _stage_of(run)
    config = load_config(_run_settings(run))
    if config.runtime.device == "cpu" and gpu is None:
        raise ConfigError(
            f"{run} ran on CPUs, for which nothing is planned; `megatron-r1 plan simulate --like {run}` plays its rounds"
        )
    steps = [record for record in read_metrics(run / "metrics.jsonl") if record["step"] > 0][1:]
    if len(steps) < _STEPS:
        raise DataError(f"{run}/metrics.jsonl has {len(steps)} steps after its first, {_STEPS} are needed: let the run go on")
    signs = [sign for path in sorted((run / FOLDER).glob("rank_*.json")) if (sign := read_sign(path)) is not None]
    if not signs:
        raise DataError(f"{run}/{FOLDER} does not say how many ranks there were: give a run with runtime.heartbeat")
    job = read_job(config, stage, gpu, devices_per_node=_ranks_of_a_node(signs), world_size=signs[0].world_size)
    assumed = Assumed() if prompt is None else Assumed(prompt=prompt)
    lengths = _median_of(steps, "response_length/mean")
    time = plan_time(job, assumed if lengths is None else replace(assumed, response=lengths))
    phases: Sequence[TimePhase] = () if time is None else time.phases
    seconds = [
        ComparedFigure(phase.name, _timed(steps, TIMERS[phase.name]), phase.seconds) for phase in phases if phase.name in TIMERS
    ]
    whole = None if time is None else time.seconds
    seconds.append(ComparedFigure("whole", _median_of(steps, "seconds/step"), whole))
    engine = plan_memory(job).engine
    return Comparison(job, len(steps), seconds, _compared_memory(steps, stage_phases(job, 0, engine)))


def describe_comparison(found: Comparison) -> str:
    """Both tables."""
    lines = [f"\nseconds, median of {found.steps:,} steps", _HEAD]
    lines += [_compared_line(row, 1.0, ",.2f") for row in found.seconds]
    lines += ["\ntensors of rank 0's device at most, GB", _HEAD]
    lines += [_compared_line(row, 1e9, ",.2f") for row in found.memory]
    if all(row.measured is None for row in found.memory):
        lines.append("the run has recorded no memory/*: it is one of before, or not on GPUs")
    return "\n".join(lines)


_HEAD = f"{'':24}{'measured':>12}{'predicted':>12}{'error':>9}"


def _compared_line(row: ComparedFigure, unit: float, form: str) -> str:
    cells = ["-" if value is None else f"{value / unit:{form}}" for value in (row.measured, row.predicted)]
    error = "-" if row.error is None else f"{row.error:+.0%}"
    return f"{row.phase:24}{cells[0]:>12}{cells[1]:>12}{error:>9}"


def _compared_memory(steps: Sequence[Mapping[str, Any]], phases: Sequence[MemoryPhase]) -> list[ComparedFigure]:
    """A timer has the largest of its phases: an update's step is timed with it."""
    predicted: dict[str, float] = {}
    for phase in phases:
        timer = TIMERS.get(phase.name.partition(",")[0], {"step": "train", "saving": "checkpoint"}.get(phase.name))
        if timer is not None:
            tensors = sum(term.amount for term in phase.device if not term.name.startswith(_NOT_TENSORS))
            predicted[timer] = max(predicted.get(timer, 0.0), tensors)
    return [ComparedFigure(timer, _most(steps, f"memory/{timer}"), amount) for timer, amount in predicted.items()]


def _timed(steps: Sequence[Mapping[str, Any]], timer: str) -> float | None:
    """The median of those that have it; of checkpoints, which few steps have, their share of every step, as a plan's."""
    if timer != "checkpoint":
        return _median_of(steps, f"seconds/{timer}")
    found = [record.get(f"seconds/{timer}") or 0.0 for record in steps]
    return sum(found) / len(found) if any(found) else None


def _median_of(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [record[name] for record in steps if isinstance(record.get(name), int | float)]
    return median(values) if values else None


def _most(steps: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return max((record[name] for record in steps if isinstance(record.get(name), int | float)), default=None)


def _ranks_of_a_node(signs: Sequence[Sign]) -> int:
    return max(Counter(sign.host for sign in signs).values())


def _stage_of(run: Path) -> Stage:
    try:
        command = json.loads((run / "run.json").read_text(encoding="utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"{run} is no run folder ({one_line(error)}): give the run_dir of a command") from None
    if command not in STAGES:
        raise ConfigError(f"{run} is a run of {str(command)[:100]!r}, which is not planned: {', '.join(STAGES)} are")
    return cast(Stage, command)


def _run_settings(run: Path) -> Path:
    path = run / "config.yaml"
    if not path.is_file():
        raise DataError(f"{run} has no config.yaml: give the run_dir of a command")
    return path
