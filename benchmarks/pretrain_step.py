"""One step of pretraining on equal rows: ours against a causal language model of transformers with torch's AdamW.

Both start from the same weights and see the same rows, with the same clipping and the same AdamW settings, in one process and in
two: ours data-parallel, the peer with DistributedDataParallel, both over gloo. Before anything is timed, loss and gradient norm of
the first step must agree. Then the smallest model is trained from a blend of 2 GB of tokens, which is made first, as the stage does
it, and the time that its steps wait for rows is taken.

    python -m benchmarks.pretrain_step --out pretrain_step.json

It ends with 0 only if ours has at least as many tokens per second in every case, and waits less than a hundredth of the time.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Disagreement, describe_machine, parser_of, positive, print_table, run, write_results
from benchmarks.processes import ROOT, CommandFailed
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.launch import child_environment

LEAST_RATIO = 1.0  #: of our tokens per second to transformers'
MOST_WAITING = 0.01  #: of a step's time


def worker_command(processes: int, argv: Sequence[str]) -> list[str]:
    """The command line that runs this module in so many processes."""
    module = ["-m", "benchmarks.pretrain_step", *argv]
    if processes == 1:
        return [sys.executable, *module]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *module]


def below_the_bar(cases: Sequence[dict[str, Any]], waiting: Sequence[dict[str, Any]]) -> list[str]:
    """What does not hold, in words."""
    slow = [f"{case['workload']}: {case['speed_ratio']:.2f}" for case in cases if not case["speed_ratio"] >= LEAST_RATIO]
    waits = [
        f"{found['processes']} processes wait {100 * found['wait_share']:.2f}% of the time for rows"
        for found in waiting
        if not found["wait_share"] < MOST_WAITING
    ]
    return slow + waits


def print_results(cases: Sequence[dict[str, Any]], waiting: Sequence[dict[str, Any]]) -> None:
    """Both tables."""
    rows = []
    for case in cases:
        speeds = [_median_speed(case[side]) for side in ("ours", "peer")]
        rows.append([case["workload"], *speeds, f"{case['speed_ratio']:.2f}", f"{case['cpu_ratio']:.2f}"])
    print_table(["case", "ours, tokens/s", "transformers, tokens/s", "ours / transformers", "the same by CPU time"], rows)
    if waiting:
        rows = [
            [
                f"{found['shape']}, hidden {found['hidden']}, {found['dtype']}, {found['processes']} processes",
                f"{found['blend_bytes'] / 1e9:.1f}",
                f"{found['open_seconds']:.1f}",
                f"{1000 * found['first_wait_seconds']:.0f}",
                f"{100 * found['wait_share']:.2f}%",
            ]
            for found in waiting
        ]
        print_table(["training from a blend", "GB", "seconds to open it", "first wait, ms", "later waits, of the time"], rows)


def _median_speed(side: dict[str, list[float]]) -> str:
    speeds = sorted(amount / seconds for amount, seconds in zip(side["amounts"], side["wall_seconds"], strict=True))
    return f"{(speeds[len(speeds) // 2] + speeds[(len(speeds) - 1) // 2]) / 2:,.0f}"


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Start a job for each number of processes, print its tables and write the JSON file. Raises Disagreement below the bar."""
    cases, waiting, machine = [], [], describe_machine(arguments.device)
    if arguments.dir is not None and not arguments.dir.is_dir():
        raise ConfigError(f"--dir {arguments.dir}: there is no such folder")
    folder = None if arguments.dir is None else arguments.dir.resolve()  # the jobs start in the project's root
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-", dir=folder) as name:
        for processes in arguments.processes:
            result = Path(name, f"{processes}.json")
            command = worker_command(processes, [*argv, "--worker", str(result), "--dir", name])
            environment = child_environment({"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})
            code = subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode
            if code:
                raise CommandFailed(f"the job of {processes} processes ended with code {code}")
            found = json.loads(result.read_text(encoding="utf-8"))
            cases, waiting, machine = cases + found["cases"], waiting + found["waiting"], found["machine"]
    print_results(cases, waiting)
    if arguments.out is not None:
        write_results(arguments.out, arguments, {"pretrain_step": cases, "waiting": waiting}, machine)
    missed = below_the_bar(cases, waiting)
    if missed:
        bar = f"{LEAST_RATIO} of transformers' tokens per second, less than {MOST_WAITING:.0%} of the time waiting"
        raise Disagreement(f"the bar is {bar}: {'; '.join(missed)}")


def work(arguments: argparse.Namespace) -> None:
    """One rank of a job."""
    from megatron_r1.pipeline.session import open_session

    with open_session(RuntimeConfig(device=arguments.device, threads=1)) as session:
        from benchmarks.pretrain_ranks import measure_all  # Megatron-Core is imported in a session only

        measure_all(session, arguments, arguments.dir)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("One step of pretraining against transformers + AdamW on equal rows, same weights and tokens.", repeats=7)
    parser.add_argument("--shapes", nargs="+", choices=("v3", "qwen"), default=["v3", "qwen"], help="of the models")
    parser.add_argument("--sizes", type=positive, nargs="+", default=[128, 512, 1024], help="hidden sizes, multiples of 64")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"], help="number formats")
    parser.add_argument("--processes", type=positive, nargs="+", default=[1, 2], help="of a job")
    parser.add_argument("--rows", type=positive, default=16, help="of each process in a step")
    parser.add_argument("--tokens", type=positive, default=64, help="of a row")
    parser.add_argument(
        "--peer-bf16",
        choices=("autocast", "weights"),
        default="autocast",
        help="transformers in bf16: weights in float32 as `Trainer` has them, or weights and moments in bf16 alone",
    )
    parser.add_argument("--gigabytes", type=float, default=2, help="of the blend; 0: without that part")
    parser.add_argument("--steps", type=positive, default=50, help="that are timed with the blend")
    parser.add_argument("--dir", type=Path, help="where the blend is made; default: that of temporary files")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.worker is not None:
        arguments.out = None
        return run(work, arguments)
    return run(lambda parsed: benchmark(parsed, argv), arguments)


if __name__ == "__main__":
    sys.exit(main())
