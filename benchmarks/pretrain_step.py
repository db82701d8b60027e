"""One step of pretraining on equal rows: ours against a causal language model of transformers with torch's AdamW.

Both start from the same weights and see the same rows, with the same clipping and the same AdamW settings, in one process and in
two: ours data-parallel, the peer with DistributedDataParallel, both over gloo. Each side has processes of its own, which live as
long as the comparison and compute in turn. Before anything is timed, loss and gradient norm of the first step must agree. Then the
smallest model is trained from a blend of 2 GB of tokens, which is made first, as the stage does it, and the time that its steps
wait for rows is taken.

    python -m benchmarks.pretrain_step --out pretrain_step.json

It ends with 0 only if ours has at least as many tokens per second in every case, and waits less than a hundredth of the time.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.measure import Disagreement, check_agreement, parser_of, positive, positive_seconds, print_table, run, write_results
from benchmarks.side_ranks import SideRanks, compare_in_turns
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError

TOLERANCES = {"fp32": {"loss": 1e-4, "grad_norm": 1e-3}, "bf16": {"loss": 0.02, "grad_norm": 0.05}}
LEAST_RATIO = 1.0  #: of our tokens per second to transformers'
MOST_WAITING = 0.01  #: of a step's time


def worker_command(side: str, argv: Sequence[str]) -> list[str]:
    """The command line of a rank of `ours` or of the `peer`."""
    return [sys.executable, "-m", "benchmarks.pretrain_step", *argv, "--side", side]


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


def measure_case(
    ours: SideRanks, peer: SideRanks, shape: str, hidden: int, dtype: str, processes: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Have both sides build the model, check that they agree, and time them."""
    name = f"{shape}, hidden {hidden}, {dtype}, {processes} process{'es' * (processes > 1)}"
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-", dir=arguments.dir) as folder:
        place = str(Path(folder, "hf").resolve())  # the ranks start in the project's root
        own = ours.order("build", shape=shape, hidden=hidden, dtype=dtype, folder=place)[0]
        other = peer.order("build", dtype=dtype, folder=place)[0]
    check_agreement(name, own["first"], other.pop("first"), **TOLERANCES[dtype])
    amount = arguments.rows * arguments.tokens * processes
    turns = {"repeats": arguments.repeats, "turn_seconds": arguments.turn_seconds}
    found = compare_in_turns(name, ours, peer, amount=amount, **turns)
    ratios = {"speed_ratio": found.speed_ratio, "cpu_ratio": found.cpu_ratio}
    return {"shape": shape, "hidden": hidden, "dtype": dtype, "processes": processes, **other, **asdict(found), **ratios}


def benchmark(arguments: argparse.Namespace, argv: Sequence[str]) -> None:
    """Start both sides for each number of processes, print the tables, write the JSON file. Raises Disagreement below the bar."""
    cases, waiting, machine = [], [], {}
    if arguments.dir is not None and not arguments.dir.is_dir():
        raise ConfigError(f"--dir {arguments.dir}: there is no such folder")
    with tempfile.TemporaryDirectory(prefix="megatron_r1-benchmark-", dir=arguments.dir) as name:
        for processes in arguments.processes:
            ours = SideRanks("ours", worker_command("ours", argv), processes)
            with ours, SideRanks("transformers", worker_command("peer", argv), processes) as peer:
                machine = machine or ours.order("machine")[0]
                for shape in arguments.shapes:
                    for hidden in arguments.sizes:
                        for dtype in arguments.dtypes:
                            cases.append(measure_case(ours, peer, shape, hidden, dtype, processes, arguments))
                if arguments.gigabytes:
                    waiting.append(ours.order("waiting", folder=str(Path(name).resolve()))[0])
    print_results(cases, waiting)
    if arguments.out is not None:
        write_results(arguments.out, arguments, {"pretrain_step": cases, "waiting": waiting}, machine)
    missed = below_the_bar(cases, waiting)
    if missed:
        bar = f"{LEAST_RATIO} of transformers' tokens per second, less than {MOST_WAITING:.0%} of the time waiting"
        raise Disagreement(f"the bar is {bar}: {'; '.join(missed)}")


def work(arguments: argparse.Namespace) -> None:
    """One rank of a side."""
    if arguments.side == "peer":
        from benchmarks.pretrain_peer import serve_peer

        return serve_peer(arguments)
    from megatron_r1.pipeline.session import open_session

    with open_session(RuntimeConfig(device=arguments.device, threads=1)) as session:
        from benchmarks.pretrain_ours import serve_ours  # Megatron-Core is imported in a session only

        serve_ours(session, arguments)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = parser_of("One step of pretraining against transformers + AdamW on equal rows, same weights and tokens.", repeats=5)
    parser.add_argument(
        "--turn-seconds", type=positive_seconds, default=2.0, help="that each turn of a side lasts, at least one step"
    )
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
    parser.add_argument("--side", choices=("ours", "peer"), help=argparse.SUPPRESS)  # be a rank of it
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = parse_arguments(argv)
    if arguments.side is not None:
        arguments.out = None
        return run(work, arguments)
    return run(lambda parsed: benchmark(parsed, argv), arguments)


if __name__ == "__main__":
    sys.exit(main())
