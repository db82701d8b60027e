"""The arguments of `megatron-r1 plan simulate`. Imports nothing heavy: `--help` responses at once."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

DESCRIPTION = """Play rounds of GRPO as discrete events, without a model: how long the longest responses keep engines and trainer
waiting, synchronously, one step off, and with partial rollouts. Round, limits and placement of engines are those of the config:
grpo.prompts_per_rollout, grpo.group_size, rollout.placement, rollout.dispatch, rollout.max_num_seqs, rollout.max_response_tokens.
"""
EXAMPLES = """examples:
  megatron-r1 plan simulate rollout.placement=disaggregated --engines 64 --lengths lognormal:8000,0.8,0.5 \\
      --decode 1:0.020,64:0.033,256:0.07 --train-tokens-per-second 300000 --logprob-tokens-per-second 900000 --sync-seconds 3
  megatron-r1 plan simulate --config examples/v3_671b/r1_zero.yaml --gpu H800 --nodes 64 --lengths lognormal:8000,0.7
  megatron-r1 plan simulate --like runs/r1_zero --oversampling 1.25   # a run's own rates and lengths, in other ways"""


def add_simulate(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of the command and its handler."""
    parser.description, parser.epilog = DESCRIPTION, EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings; what it leaves out keeps its default")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value", help="settings that replace those of the file")
    parser.add_argument(
        "--like", type=Path, metavar="RUN_DIR",
        help="take settings, lengths and rates from what a finished run of grpo has recorded; options below replace them",
    )  # fmt: skip
    parser.add_argument(
        "--gpu", metavar="NAME",
        help="take the rates that `megatron-r1 plan` works out for this device, on --nodes; options below replace them",
    )  # fmt: skip
    parser.add_argument("--nodes", type=_count_up, metavar="N", help="of --gpu; default: as few as the layout needs")
    parser.add_argument("--rounds", type=_count_up, default=8, metavar="N", help="rounds to play (default: 8)")
    parser.add_argument("--seed", type=_from_zero, default=0, metavar="N", help="of the lengths (default: 0)")
    parser.add_argument(
        "--oversampling", type=_number_within(1, 16), action="append", metavar="X",
        help="also with partial rollouts: X times the prompts of a round are in flight; may be repeated (default: 1.25)",
    )  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE.json", help="also write every round there")

    responses = parser.add_argument_group("responses")
    responses.add_argument(
        "--lengths", metavar="LENGTHS",
        help="equal:TOKENS; lognormal:MEAN,SIGMA[,SHARED] with the part of its variance that a prompt's responses share; a "
        "run folder, whose prompts are drawn; replay:RUN_DIR, its rounds as they were",
    )  # fmt: skip
    responses.add_argument("--prompt-tokens", type=_from_zero, metavar="N", help="of every prompt (default: 0; with --gpu 160)")

    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--engines", type=_count_up, metavar="N", help="engines of the job; needed unless rollout.placement=single"
    )
    engines.add_argument(
        "--decode", type=_decode, metavar="N:SECONDS,...",
        help="seconds of a step with N sequences, without what their contexts take",
    )  # fmt: skip
    engines.add_argument(
        "--context-seconds", type=_number_within(0, 1), metavar="S", help="of a step for every token in context (default: 0)"
    )
    engines.add_argument("--prefill-tokens-per-second", type=_rate, metavar="N", help="of one engine (default: no time)")
    engines.add_argument("--cache-tokens", type=_count_up, metavar="N", help="that one engine's cache holds (default: all)")

    trainer = parser.add_argument_group("trainer and scoring")
    for part in ("logprob", "train"):
        trainer.add_argument(
            f"--{part}-tokens-per-second",
            type=_rate,
            metavar="N",
            help="of prompts and responses, all ranks (default: no time)",
        )
    trainer.add_argument("--sync-seconds", type=_number_within(0, 1e6), metavar="S", help="of a transfer of weights (default: 0)")
    trainer.add_argument("--rest-seconds", type=_number_within(0, 1e6), metavar="S", help="of records and checkpoints (default: 0)")
    trainer.add_argument("--scorers", type=_count_up, metavar="N", help="processes that score (default: 1)")
    trainer.add_argument("--score-seconds", type=_number_within(0, 1e6), metavar="S", help="of one response (default: 0)")
    parser.set_defaults(handler=_handle)


def _handle(arguments: argparse.Namespace) -> int:
    from megatron_r1.plan.simulate_command import describe_simulation

    print(describe_simulation(arguments))
    return 0


def _count_up(text: str) -> int:
    number = _from_zero(text)
    if not number:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 to {1 << 40:,}")
    return number


def _from_zero(text: str) -> int:
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 15 else -1
    if not 0 <= number <= 1 << 40:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number up to {1 << 40:,}")
    return number


def _number_within(least: float, most: float) -> Callable[[str], float]:
    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text!r} is no number from {least:g} to {most:g}")
        return number

    return read


_rate = _number_within(1e-6, 1e15)


def _decode(text: str) -> tuple[tuple[int, float], ...]:
    points = []
    for part in text.split(","):
        sequences, _, seconds = part.partition(":")
        points.append((_count_up(sequences), _number_within(1e-9, 1e6)(seconds)))
    if [n for n, _ in points] != sorted({n for n, _ in points}):
        raise argparse.ArgumentTypeError(f"{text!r}: the numbers of sequences must rise, as in 1:0.02,64:0.03")
    if [s for _, s in points] != sorted(s for _, s in points):
        raise argparse.ArgumentTypeError(f"{text!r}: a step with more sequences takes no less time")
    return tuple(points)
