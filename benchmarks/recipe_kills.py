"""The small R1 pipeline killed again and again: does it end with the files that it makes undisturbed?

    python -m benchmarks.recipe_kills --dir /scratch [--kills 20] [--seed 0] [--out FILE.json]

`examples/tiny_cpu/r1.yaml` with fewer steps runs twice from nothing: once undisturbed, and once with SIGKILL at random moments of
all stages, started again after each. Every other kill takes the command alone and leaves its engine and scoring workers to notice,
the others its whole process group. In the end the artifacts of all stages (weights, tokenizer, config and the hashes of what went
in), every sample, every kept and curated record and every measurement must be the same, byte for byte; the ledger of a served
model's answers line by line, whatever their order. A file that differs ends the command with code 1.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TextIO

from benchmarks.kills import differing, hashes, last_line, start_command, wait_until_dead
from benchmarks.measure import Disagreement, describe_machine, positive, run, write_results
from benchmarks.processes import ROOT, CommandFailed, serve_rules
from benchmarks.small_recipe import write_small_recipe
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.launch import child_environment

RUN = Path("runs/r1")  # as the example has it, so that both runs write the same paths into their artifacts
_STARTUP_SECONDS = 8.0  # of a stage's model and engine, in which there is nothing to lose


def start_pipeline(folder: Path, log: Path) -> subprocess.Popen:
    """The command as a user starts it."""
    return start_command([sys.executable, "-m", "megatron_r1.cli", "pipeline", "r1", "--config", "r1.yaml"], folder, log)


def run_undisturbed(folder: Path, log: Path) -> dict[str, float]:
    """Seconds after the start at which each stage began, and "end"."""
    start, began = time.perf_counter(), {}
    with start_pipeline(folder, log) as process, log.open(errors="replace") as reader:
        while process.poll() is None:
            for stage in _stages_told(reader):
                began.setdefault(stage, time.perf_counter() - start)
            time.sleep(0.1)
    if process.returncode != 0:
        raise CommandFailed(f"the undisturbed pipeline ended with code {process.returncode}: {last_line(log)}")
    return began | {"end": time.perf_counter() - start}


def choose_moments(timeline: dict[str, float], kills: int, rng: random.Random) -> list[tuple[str, float]]:
    """Stages, in their order, and seconds after their begin, so that the moments spread evenly over the undisturbed run."""
    names, begins = list(timeline)[:-1], list(timeline.values())
    moments = []
    for moment in sorted(rng.uniform(begins[0], begins[-1]) for _ in range(kills)):
        stage = max(index for index, begin in enumerate(begins[:-1]) if begin <= moment)
        moments.append((names[stage], moment - begins[stage]))
    return moments


def run_with_kills(folder: Path, log: Path, moments: list[tuple[str, float]]) -> list[str]:
    """Kill the pipeline at every moment, start it again after each, and let it end.

    Where the one before came in the same stage, the time until the next counts from there, and what the command needs to get
    back to work comes on top: else all of one stage would come in its start.

    Returns:
        Where each kill came.

    Raises:
        CommandFailed: it ended with an error.
    """
    hit: list[str] = []
    before: tuple[str, float] = ("", 0.0)
    for number, (stage, moment) in enumerate(moments):
        again = stage == before[0]
        wait = moment - before[1] + _STARTUP_SECONDS if again else moment
        before = (stage, moment)
        with log.open(errors="replace") as reader:
            reader.seek(0, os.SEEK_END)
            process = start_pipeline(folder, log)
            told: list[str] = []
            while process.poll() is None and stage not in told:
                told += _stages_told(reader)
                time.sleep(0.05)
        try:
            process.wait(wait)
        except subprocess.TimeoutExpired:
            kill(process, folder, whole_group=number % 2 == 1)
            hit.append(f"{wait:.0f} s after the begin of {stage}: {last_line(log)[:80]}")
            print(f"kill {number + 1} of {len(moments)}, {hit[-1]}", flush=True)
            continue
        if process.returncode == 0:
            print(f"all was done before kill {number + 1}", flush=True)
            return hit
        raise CommandFailed(f"try {number + 1} ended with code {process.returncode}: {last_line(log)}")
    run_undisturbed(folder, log)
    return hit


def kill(process: subprocess.Popen, folder: Path, *, whole_group: bool) -> None:
    """SIGKILL, to the command or its group. Raises CommandFailed, see `wait_until_dead`."""
    (os.killpg if whole_group else os.kill)(process.pid, signal.SIGKILL)
    wait_until_dead(process, folder)


def benchmark(arguments: argparse.Namespace) -> None:
    """Run both, compare."""
    if not arguments.dir.is_dir():
        raise ConfigError(f"--dir {arguments.dir}: there is no such folder")
    logs = {kind: arguments.dir / f"recipe_kills_{kind}.log" for kind in ("undisturbed", "killed")}
    machine = describe_machine("cpu")
    with tempfile.TemporaryDirectory(prefix="megatron_r1-kills-", dir=arguments.dir) as name:
        folder = Path(name).resolve()
        with serve_rules() as url:
            write_small_recipe(folder / "r1.yaml", url)
            start_over(folder, logs["undisturbed"])
            timeline = run_undisturbed(folder, logs["undisturbed"])
            print("undisturbed: " + ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in timeline.items()), flush=True)
            undisturbed = hashes(folder / RUN)
            (folder / RUN).rename(folder / "undisturbed")
            start_over(folder, logs["killed"])
            # A few more than asked for: what was done before a kill is not done again, so the last ones may come too late.
            moments = choose_moments(timeline, arguments.kills + arguments.kills // 4, random.Random(arguments.seed))
            hit = run_with_kills(folder, logs["killed"], moments)
            killed = hashes(folder / RUN)
    different = differing(undisturbed, killed)
    artifacts = sum(path.endswith("artifact.json") for path in undisturbed)
    print(f"{len(undisturbed)} files compared, {artifacts} artifacts among them, {len(hit)} kills: {len(different)} differ")
    if arguments.out is not None:
        results = {"timeline": timeline, "killed": hit, "hashes": undisturbed, "differing": different}
        write_results(arguments.out, arguments, results, machine)
    if len(hit) < arguments.kills:
        raise CommandFailed(f"all was done after {len(hit)} of {arguments.kills} kills: choose another --seed")
    if different:
        raise Disagreement(f"after {len(hit)} kills these differ: {', '.join(different[:20])}")


def start_over(folder: Path, log: Path) -> None:
    """An empty log, and the files that the pipeline reads."""
    log.write_bytes(b"")
    command = [sys.executable, str(ROOT / "tools/make_tally_chat.py"), "--out", str(RUN / "data")]
    subprocess.run(command, cwd=folder, env=child_environment({"PYTHONPATH": str(ROOT)}), check=True, stdout=subprocess.DEVNULL)


def _stages_told(reader: TextIO) -> list[str]:
    """Stages whose begin has been printed since the last call."""
    return re.findall(r"^== (\w+):", reader.read(), re.MULTILINE)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, required=True, help="where to work: a temporary folder and the two logs")
    parser.add_argument("--kills", type=positive, default=20, help="default: 20")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="also write the hashes, with machine and versions")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(run(benchmark, parse_arguments()))
