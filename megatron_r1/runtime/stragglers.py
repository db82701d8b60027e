"""Which rank is slow: the times of every rank, side by side.

All ranks of a job wait for the slowest, so the wall clock of a step is the same on each. Two times differ: `probe`, a fixed piece
of work that every rank times for itself, and `cpu`, the processor time of the step, which waiting does not use.

`metrics.jsonl` gets the extremes; `ranks.jsonl` gets one line for each measured step, with a number for every rank.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

from megatron_r1.runtime.device import device_in_use, time_fixed_work
from megatron_r1.runtime.distributed import gather_objects, is_rank_zero, world_size
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.metrics import read_metrics

FILE = "ranks.jsonl"
SECONDS_BETWEEN = 10.0  #: least time between two measurements, so that they do not slow short steps down


class StragglerLog:
    """Measures the ranks from time to time. Every rank holds one.

    Args:
        folder: the run folder.
        last_step: lines of later steps are dropped: these steps will be done again.
    """

    def __init__(self, folder: Path, last_step: int) -> None:
        self._path = folder / FILE
        self._due_at = time.monotonic()
        self._cpu = time.process_time()
        self.due = world_size() > 1  #: whether the next record measures; the same on every rank
        if is_rank_zero() and self._path.exists():
            kept = [record for record in read_metrics(self._path) if record["step"] <= last_step]
            write_atomically(self._path, "".join(json.dumps(record) + "\n" for record in kept))

    def wants_to_measure(self) -> bool:
        """Whether, by this rank's clock, it is time to measure again."""
        return world_size() > 1 and time.monotonic() >= self._due_at

    def measure(self, step: int, seconds: Mapping[str, float]) -> dict[str, float]:
        """Time the ranks and return the metrics. Collective; call it when `due` is set.

        Args:
            seconds: this rank's wall clock of the step, by timer.
        """
        self._due_at = time.monotonic() + SECONDS_BETWEEN
        cpu, self._cpu = time.process_time() - self._cpu, time.process_time()
        ranks = gather_objects(
            {"probe": time_fixed_work(device_in_use()), "cpu": cpu} | {k.removeprefix("seconds/"): v for k, v in seconds.items()}
        )
        if is_rank_zero():
            names = [name for name in ranks[0] if all(name in of_rank for of_rank in ranks)]
            line = {"step": step} | {name: [round(of_rank[name], 6) for of_rank in ranks] for name in names}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return straggler_metrics([of_rank["probe"] for of_rank in ranks], [of_rank["cpu"] for of_rank in ranks])


def straggler_metrics(probe: list[float], cpu: list[float]) -> dict[str, float]:
    """The metrics: the slowest rank's number and time, beside the median of all."""
    return {
        "seconds/ranks/slowest": probe.index(max(probe)),
        "seconds/ranks/probe_max": max(probe),
        "seconds/ranks/probe_median": statistics.median(probe),
        "seconds/ranks/cpu_max": max(cpu),
        "seconds/ranks/cpu_median": statistics.median(cpu),
    }
