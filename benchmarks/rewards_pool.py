"""The scoring pool: responses scored per second, from one worker to more.

    python -m benchmarks.rewards_pool --data FOLDER [--workers 1 2] [--limit N] [--repeats N] [--out FILE.json]

FOLDER holds math/gsm8k_train.jsonl, math/math_train.json and language/<language>.txt as their authors publish them. Half of the
math responses give the right answer, half another problem's. `format` costs next to nothing to score: its rate is that of the pool.
The verdicts must not depend on the number of workers, else the benchmark fails.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.measure import Disagreement, describe_machine, positive, print_table, run, write_results
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rewards.scorers import scorer_specs
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.rewards.workers.process import WorkerLimits

Item = tuple[str, str, Any]  #: scorer, response, reference


def math_items(folder: Path) -> list[Item]:
    """Every answer against itself and against the next problem's, in turn."""
    lines = (folder / "math/gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in lines]
    answers += [str(row["answer"]) for row in json.loads((folder / "math/math_train.json").read_text(encoding="utf-8"))]
    # Spread over both sources, so that any first part of the list has the mixture of the whole.
    answers = answers[0::4] + answers[1::4] + answers[2::4] + answers[3::4]
    responses = [f"<think>so</think><answer>{answer}</answer>" for answer in answers]
    pairs = zip(responses, answers, answers[1:] + answers[:1], strict=True)
    return [("math", response, own if index % 2 else other) for index, (response, own, other) in enumerate(pairs)]


def language_items(folder: Path) -> list[Item]:
    """Ten sentences at a time, as a reasoning in their own language."""
    items = []
    for path in sorted((folder / "language").glob("*.txt")):
        sentences = path.read_text(encoding="utf-8").split("\n")
        for start in range(0, len(sentences), 10):
            items.append(("language", f"<think>{' '.join(sentences[start : start + 10])}</think>", path.stem))
    return items[0::2] + items[1::2]


def format_items(folder: Path) -> list[Item]:
    """The responses of `math_items`."""
    return [("format", response, None) for _, response, _ in math_items(folder)]


SOURCES: dict[str, Callable[[Path], list[Item]]] = {"format": format_items, "math": math_items, "language": language_items}


def measure(scorer: str, items: list[Item], workers: int) -> tuple[float, list[Any]]:
    """(responses per second once the workers have started, verdicts)."""
    config = RewardConfig()
    with ScoringPool(
        scorer_specs(config, [scorer], "r1_zero"),
        workers=workers,
        limits=WorkerLimits(config.worker_memory_bytes, config.worker_recycle_bytes),
    ) as pool:
        list(pool.stream(items[: 2 * workers]))
        started = time.perf_counter()
        verdicts = list(pool.stream(items))
        return len(items) / (time.perf_counter() - started), verdicts


def benchmark(arguments: argparse.Namespace) -> None:
    """Score the same responses with each number of workers in turn, `repeats` times."""
    if not (arguments.data / "math/gsm8k_train.jsonl").is_file():
        raise ConfigError(f"--data {arguments.data}: there is no math/gsm8k_train.jsonl in it")
    machine = describe_machine("cpu")
    rows, results = [], {}
    for scorer, read in SOURCES.items():
        items = read(arguments.data)[: arguments.limit]
        rates: dict[int, list[float]] = {workers: [] for workers in arguments.workers}
        expected = None
        for _ in range(arguments.repeats):
            for workers in arguments.workers:
                rate, verdicts = measure(scorer, items, workers)
                rates[workers].append(rate)
                if verdicts != (expected := expected or verdicts):
                    raise Disagreement(f"{scorer}: the verdicts depend on the number of workers, or on the run")
        first = rates[arguments.workers[0]]
        for workers, values in rates.items():
            growth = median(value / base for value, base in zip(values, first, strict=True))
            rows.append((scorer, str(len(items)), str(workers), f"{median(values):.0f}", f"{growth:.2f}"))
        results[scorer] = {"responses": len(items), "per_second": rates}
    print_table(("scorer", "responses", "workers", "responses/s", f"against {arguments.workers[0]}"), rows)
    if arguments.out is not None:
        arguments.data = arguments.data.name
        write_results(arguments.out, arguments, results, machine)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the published data files")
    parser.add_argument("--workers", type=positive, nargs="+", default=[1, 2], help="numbers of processes to try in turn")
    parser.add_argument("--limit", type=positive, help="responses for each scorer; default: all")
    parser.add_argument("--repeats", type=positive, default=3, help="timed runs of each number of workers")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the figures, with machine and versions")
    return run(benchmark, parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
