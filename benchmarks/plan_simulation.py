"""Rounds as `megatron-r1 plan simulate` predicts them, against rounds that were run.

It makes runs of `megatron-r1 grpo` with a tiny DeepSeek-V3 on the CPU whose responses end with the same probability at every
token, so that a round has a long tail. Rates are fitted on two of them, one engine with many and with few sequences at a time. Then
the rounds of the others, which the fit never saw, are played with the lengths that they had: another limit of sequences, and two
engines.

By default time is the processors': in every round, what the process of the engine that was done last computed, and what the
trainer's did, one after the other as in a synchronous round. So other work on the machine hardly matters; prompts are divided
beforehand (`rollout.dispatch=fixed`), as a queue is emptied by the wall clock. With `--clock wall` engines share the queue, and a
round is what the timers rollout, reward, logprob, train and sync say together; that needs a quiet machine, and two engines a core
each. With two engines the trainer has two ranks, for which no rate is fitted: of that case sampling alone is compared.

    python -m benchmarks.plan_simulation --out plan_simulation.json
    python -m benchmarks.plan_simulation --run RUN_DIR     # of a run of yours: rates from its odd rounds, its even ones predicted

The command ends with 0 only if the median error of the time is at most 15% in every predicted case, and the engines' idle share is
at most 5 points off.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import yaml

from benchmarks.against_trl.folder import make_random_folder
from benchmarks.against_trl.workloads import WORKLOADS, our_config
from benchmarks.measure import describe_machine, parser_of, positive, print_table, run, write_results
from benchmarks.processes import run_watched
from benchmarks.round_clocks import Clocks, run_by_processor_clock
from megatron_r1.config.data import DataConfig
from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.plan.simulate import Mode, Setup, simulate
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines
from megatron_r1.plan.simulate_fit import PARTS, FittedRates, RecordedRound, fit_rates, read_rounds
from megatron_r1.plan.simulate_lengths import Replayed, recorded_lengths

BAR, IDLE_BAR = 0.15, 0.05  #: relative error of a round's time; difference of idle shares
ANY_SPEED = EngineSpeed(((1, 1.0),))
#: the tiny model, and rounds of 128 responses of 192 tokens at most, of which one in twenty is cut, and one update
WORKLOAD = replace(WORKLOADS["tiny"], name="tail", prompts=16, group_size=8, minibatch=128, tokens=192, mixed=True)


@dataclass(frozen=True)
class Case:
    """One run."""

    name: str
    max_num_seqs: int
    engines: int = 1
    is_fitted: bool = False  #: rates come from it


CASES = (
    Case("128 sequences at a time", 128, is_fitted=True),
    Case("16 sequences at a time", 16, is_fitted=True),
    Case("48 sequences at a time", 48),
    Case("two engines, 24 at a time each", 24, engines=2),
)


@dataclass
class Outcome:
    """One case. Entry i of every list belongs to round i."""

    case: str
    was_fitted: bool
    whole: bool = True  #: whether whole rounds are compared, or sampling alone
    measured: list[float] = field(default_factory=list)  #: seconds
    predicted: list[float] = field(default_factory=list)
    rollout_measured: list[float] = field(default_factory=list)
    rollout_predicted: list[float] = field(default_factory=list)
    idle_measured: list[float] = field(default_factory=list)  #: share of the engines' time of sampling
    idle_predicted: list[float] = field(default_factory=list)

    @property
    def error(self) -> float:
        """Median over rounds of the relative error of a round's time, or its sampling's."""
        predicted, measured = self.rollout_predicted, self.rollout_measured
        if self.whole:
            predicted, measured = self.predicted, self.measured
        return median(abs(p / m - 1) for p, m in zip(predicted, measured, strict=True))

    @property
    def idle_error(self) -> float:
        """Of the median shares."""
        return abs(median(self.idle_predicted) - median(self.idle_measured))

    @property
    def holds(self) -> bool:
        """Whether both bars do, or nothing was predicted."""
        return self.was_fitted or (self.error <= BAR and self.idle_error <= IDLE_BAR)


def predict(
    case: str, was_fitted: bool, rates: FittedRates, engines: PlayedEngines, rounds: Sequence[RecordedRound], *, whole: bool = True
) -> Outcome:
    """Play recorded rounds with their lengths, each by itself."""
    outcome = Outcome(case, was_fitted, whole)
    own = replace(engines, speed=rates.speed, start_seconds=rates.start_seconds)
    trainer = replace(rates.trainer, rest=0.0)
    for recorded in rounds:
        setup = Setup(len(recorded.lengths), len(recorded.lengths[0]), own, trainer, rates.scorers)
        (played,) = simulate(setup, Mode(), Replayed([recorded.lengths]), 1)
        outcome.measured.append(sum(recorded.seconds[part] for part in PARTS))
        outcome.predicted.append(played.seconds)
        outcome.rollout_measured.append(recorded.seconds["rollout"])
        outcome.rollout_predicted.append(played.rollout)
        outcome.idle_measured.append(recorded.idle)
        outcome.idle_predicted.append(played.engines_in_tail * played.seconds / played.rollout)
    return outcome


def engines_of(folder: Path, count: int) -> PlayedEngines:
    """The engines of a run, without their speed."""
    rollout = load_config(folder / "config.yaml").rollout
    return PlayedEngines(count, rollout.max_num_seqs, ANY_SPEED, dispatch=rollout.dispatch)


def config_of(case: Case, folder: Path, model: Path, rounds: int, seed: int, clock: str) -> dict[str, Any]:
    """The config of a case's run of grpo."""
    data = DataConfig(source="tally", template="r1_zero", max_prompt_tokens=32)
    config: dict[str, Any] = our_config(WORKLOAD, run_dir=folder, model=model, data=data, threads=1, seed=seed)
    config["grpo"]["rollouts"] = config["checkpoint"]["interval"] = rounds
    config["rollout"]["max_num_seqs"] = case.max_num_seqs
    config["rollout"]["dispatch"] = "queue" if clock == "wall" else "fixed"
    if case.engines > 1:
        config["rollout"] |= {"placement": "colocated", "engines_per_node": case.engines}
    return config


def make_run(config: dict[str, Any], engines: int, clock: str) -> list[RecordedRound]:
    """Run grpo, and return its rounds without the first, which warms up."""
    folder = Path(config["run_dir"])
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={engines}"] if engines > 1 else []
    command = [sys.executable, *start, "-m", "megatron_r1.cli", "grpo", "--config", str(path)]
    if clock == "wall":
        run_watched(command)
        return read_rounds(folder)[1:]
    clocks, lengths = run_by_processor_clock(command, folder), recorded_lengths(folder)
    return [by_processor_clock(step, lengths[step], clocks[step]) for step in sorted(clocks) if step > 1]


def by_processor_clock(step: int, lengths: list[np.ndarray], clocks: Clocks) -> RecordedRound:
    """A round as its processes' clocks tell it: the trainer's whole work counts as its update."""
    busy = clocks["engine"]
    seconds = dict.fromkeys((*PARTS, "rest"), 0.0) | {"rollout": max(busy), "train": max(clocks["trainer"])}
    return RecordedRound(step, lengths, seconds, 1 - sum(busy) / (len(busy) * max(busy)))


def measure_cases(cases: Sequence[Case], rounds: int, seed: int, clock: str, work: Path) -> list[Outcome]:
    """Make all runs, fit on those that are for it, and predict all."""
    model = make_random_folder(work / "model", WORKLOAD, seed)
    runs = []
    for number, case in enumerate(cases):
        print(f"{case.name} ...", file=sys.stderr, flush=True)
        config = config_of(case, work / f"run_{number}", model, rounds + 1, seed + number, clock)
        recorded = make_run(config, case.engines, clock)
        runs.append((case, engines_of(work / f"run_{number}", case.engines), recorded))
    rates = fit_rates([(engines, recorded) for case, engines, recorded in runs if case.is_fitted])
    return [
        predict(case.name, case.is_fitted, rates, engines, recorded, whole=case.engines == 1) for case, engines, recorded in runs
    ]


def measure_run(folder: Path, engines: int) -> list[Outcome]:
    """Fit on the odd rounds of a run, and predict the even ones; the first is left out."""
    of_run, rounds = engines_of(folder, engines), read_rounds(folder)[1:]
    fitted, held_out = rounds[1::2], rounds[0::2]
    if len(fitted) < 2:
        raise ConfigError(
            f"--run {folder} has {len(rounds) + 1} rounds: five are needed, as rates need two and the first is left out"
        )
    rates = fit_rates([(of_run, fitted)])
    return [
        predict("odd rounds", True, rates, of_run, fitted),
        predict("even rounds", False, rates, of_run, held_out),
    ]


def print_outcomes(outcomes: Sequence[Outcome]) -> None:
    """The table, a line a case."""
    rows = []
    for of in outcomes:
        idle = f"{median(of.idle_measured):.1%}", f"{median(of.idle_predicted):.1%}"
        seconds = (f"{median(values):.3f}" for values in (of.rollout_measured, of.rollout_predicted, of.measured, of.predicted))
        name = f"{of.case}, {'fitted' if of.was_fitted else 'held out'}"
        rows.append([name, str(len(of.measured)), *seconds, f"{of.error:.1%}", *idle, "yes" if of.holds else "NO"])
    print_table(
        ["case", "rounds", "sampling, s", "predicted", "round, s", "predicted", "error", "engines idle", "predicted", "holds"], rows
    )


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = parser_of("Rounds of GRPO as predicted against rounds that were run.", repeats=6, devices=False)
    parser.add_argument("--run", type=Path, metavar="RUN_DIR", help="predict the even rounds of this run, and make none")
    parser.add_argument("--engines", type=positive, default=1, help="of --run")
    parser.add_argument("--clock", choices=("processor", "wall"), default="processor", help="of the runs that are made")
    parser.add_argument("--cases", type=positive, nargs="*", help=f"numbers of the cases to run, from 1 to {len(CASES)}; all")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    arguments = parse_arguments(argv)
    outcomes: list[Outcome] = []

    def benchmark(_: argparse.Namespace) -> None:
        numbers = arguments.cases or range(1, len(CASES) + 1)
        if any(number > len(CASES) for number in numbers):
            raise ConfigError(f"--cases: there are {len(CASES)}")
        if arguments.run is not None:
            outcomes.extend(measure_run(arguments.run, arguments.engines))
        else:
            with tempfile.TemporaryDirectory() as work:
                chosen = [CASES[number - 1] for number in sorted({*numbers, 1, 2})]
                outcomes.extend(measure_cases(chosen, arguments.repeats, arguments.seed, arguments.clock, Path(work)))
        print_outcomes(outcomes)
        if arguments.out is not None:
            write_results(arguments.out, arguments, {"outcomes": [asdict(of) for of in outcomes]}, describe_machine("cpu"))

    return run(benchmark, arguments) or int(not all(of.holds for of in outcomes))


if __name__ == "__main__":
    sys.exit(main())
