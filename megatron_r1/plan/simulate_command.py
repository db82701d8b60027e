"""`megatron-r1 plan simulate`: what it is told, and the table that it prints."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from megatron_r1.config.load import load_config
from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.plan.simulate import TAIL, Cost, Mode, Round, Scorers, Setup, Trainer, simulate
from megatron_r1.plan.simulate_engines import EngineSpeed, PlayedEngines
from megatron_r1.plan.simulate_fit import fit_rates, read_rounds
from megatron_r1.plan.simulate_lengths import LengthSource, parse_lengths
from megatron_r1.runtime.files import write_atomically

PARTIAL = 1.25  #: oversampling of partial rollouts, unless told otherwise
_MEASURED = 256  # prompts, by which the mean length is told to a plan
_WIDTH = 34  # characters of a row's name
_SECONDS = "seconds"  # a form: with as many digits as their size asks for

Row = tuple[str, Callable[[Round], float], str]
ROWS: Sequence[Row] = (
    ("round, seconds", lambda of: of.seconds, _SECONDS),
    ("  sampling", lambda of: of.rollout, _SECONDS),
    (f"    after {TAIL:.0%} of the responses", lambda of: of.tail, _SECONDS),
    ("  waiting for scores", lambda of: of.waited_for_scores, _SECONDS),
    ("  log-probs", lambda of: of.logprob, _SECONDS),
    ("  updates", lambda of: of.train, _SECONDS),
    ("  weights to engines", lambda of: of.sync, _SECONDS),
    ("engines idle", lambda of: of.engines_idle, ".1%"),
    ("  in the tail of others", lambda of: of.engines_in_tail, ".1%"),
    ("  while the trainer works", lambda of: of.engines_waiting, ".1%"),
    ("trainer idle", lambda of: of.trainer_idle, ".1%"),
    ("places of sequences in use", lambda of: of.occupancy, ".1%"),
    ("staleness of tokens, mean rounds", lambda of: of.staleness_mean, ".2f"),
    ("staleness of samples, most rounds", lambda of: of.staleness_max, ".0f"),
    ("responses' tokens a second", lambda of: of.tokens / of.seconds, ",.0f"),
    ("tokens computed into caches", lambda of: of.prefilled, ",.0f"),
    ("lost places in caches", lambda of: of.preemptions, ",.0f"),
)
SHARED: Row = ("devices idle, shared by both", lambda of: of.devices_idle, ".1%")


def describe_simulation(arguments: argparse.Namespace) -> str:
    """Play what the arguments say, in all ways, and describe it; write the rounds to `--json` if it is given.

    Raises ConfigError, DataError.
    """
    config = load_config(_config_file(arguments), arguments.overrides)
    source = arguments.lengths or (str(arguments.like) if arguments.like else None)
    if source is None:
        raise ConfigError("--lengths is needed: a distribution such as lognormal:4000,0.8, or a run folder")
    if arguments.json is not None and not arguments.json.parent.is_dir():
        raise ConfigError(f"--json {arguments.json}: there is no folder {arguments.json.parent}")
    limit = max([config.rollout.max_response_tokens, *(phase.max_response_tokens for phase in config.grpo.length_schedule)])

    def lengths() -> LengthSource:
        return parse_lengths(source, limit)  # anew, as a replay has a place

    mean = float(lengths().draw(_MEASURED, config.grpo.group_size, np.random.default_rng(arguments.seed)).mean())
    setup = read_setup(arguments, config, mean)
    modes = [Mode(steps_off, factor) for factor in (1.0, *(arguments.oversampling or [PARTIAL])) for steps_off in (0, 1)]
    modes = [mode for mode in dict.fromkeys(modes) if not (mode.steps_off and setup.colocated)]
    played = {mode.name: simulate(setup, mode, lengths(), arguments.rounds, arguments.seed) for mode in modes}
    if arguments.json is not None:
        rounds = {name: [asdict(of) | {"engines_idle": of.engines_idle} for of in all_of] for name, all_of in played.items()}
        write_atomically(arguments.json, json.dumps({"setup": asdict(setup), "lengths": source, "rounds": rounds}, indent=1) + "\n")
    return "\n".join(_describe_rounds(setup, source, played))


def read_setup(arguments: argparse.Namespace, config: Config, mean: float) -> Setup:
    """What is simulated: from the config, from a run (`--like`) or a plan (`--gpu`), and from the options.

    Args:
        mean: tokens of a response.

    Raises ConfigError, DataError.
    """
    grpo, rollout = config.grpo, config.rollout
    engines, trainer, scorers, prompt_tokens = _known_rates(arguments, config, mean)
    speed = engines.speed
    speed = speed if arguments.decode is None else replace(speed, decode=arguments.decode)
    speed = speed if arguments.context_seconds is None else replace(speed, context_seconds=arguments.context_seconds)
    rate = arguments.prefill_tokens_per_second
    speed = speed if rate is None else replace(speed, prefill_seconds=1 / rate)
    logprob, train = arguments.logprob_tokens_per_second, arguments.train_tokens_per_second
    trainer = Trainer(
        trainer.logprob if logprob is None else Cost(token=1 / logprob),
        trainer.train if train is None else Cost(token=1 / train),
        trainer.sync if arguments.sync_seconds is None else arguments.sync_seconds,
        trainer.rest if arguments.rest_seconds is None else arguments.rest_seconds,
    )
    scorers = replace(scorers, workers=arguments.scorers or scorers.workers, seconds=arguments.score_seconds or scorers.seconds)
    engines = replace(engines, speed=speed, cache_tokens=arguments.cache_tokens or engines.cache_tokens)
    colocated = rollout.placement != "disaggregated"
    return Setup(grpo.prompts_per_rollout, grpo.group_size, engines, trainer, scorers, prompt_tokens, colocated)


def _known_rates(arguments: argparse.Namespace, config: Config, mean: float) -> tuple[PlayedEngines, Trainer, Scorers, int]:
    """Engines, trainer and scorers before the options that replace their rates, and the tokens of a prompt."""
    rollout, is_planned = config.rollout, arguments.gpu is not None
    if is_planned and arguments.like is not None:
        raise ConfigError("rates come from --like or --gpu, not from both")
    if arguments.nodes is not None and not is_planned:
        raise ConfigError("--nodes is the size of a planned job: it needs --gpu NAME")
    if is_planned:
        from megatron_r1.plan.job import read_job  # which imports torch
        from megatron_r1.plan.simulate_planned import planned_rates
        from megatron_r1.plan.stage_time import Assumed

        prompt_tokens = Assumed().prompt if arguments.prompt_tokens is None else arguments.prompt_tokens
        rates = planned_rates(read_job(config, "grpo", arguments.gpu, arguments.nodes), Assumed(mean, prompt_tokens))
        engines = replace(rates.engines, count=arguments.engines or rates.engines.count)
        return engines, rates.trainer, Scorers(), int(prompt_tokens)
    count = arguments.engines or (1 if rollout.placement == "single" else None)
    if count is None:
        raise ConfigError(f"--engines is needed: rollout.placement={rollout.placement} does not say how many there are")
    prompt_tokens = arguments.prompt_tokens or 0
    engines = PlayedEngines(count, rollout.max_num_seqs, EngineSpeed(((1, 1.0),)), dispatch=rollout.dispatch)
    if arguments.like is not None:
        fitted = fit_rates([(engines, read_rounds(arguments.like)[1:])], prompt_tokens)  # the first round warms up
        engines = replace(engines, speed=fitted.speed, start_seconds=fitted.start_seconds)
        return engines, fitted.trainer, fitted.scorers, prompt_tokens
    if arguments.decode is None:
        raise ConfigError("--decode is needed: seconds of a step, as in 1:0.02,64:0.03; --gpu NAME takes a plan's, --like a run's")
    return engines, Trainer(Cost(), Cost()), Scorers(), prompt_tokens


def _config_file(arguments: argparse.Namespace) -> Path | None:
    if arguments.config is not None or arguments.like is None:
        return arguments.config
    path = arguments.like / "config.yaml"
    if not path.is_file():
        raise DataError(f"--like {arguments.like}: it has no config.yaml: give the run folder of grpo")
    return path


def _describe_rounds(setup: Setup, source: str, played: dict[str, list[Round]]) -> list[str]:
    of_all = next(iter(played.values()))
    responses = setup.prompts * setup.group_size
    mean = sum(of.tokens for of in of_all) / (len(of_all) * responses)
    counted = "the mean of all but the first" if len(of_all) > 1 else "the first"
    plural = "" if setup.engines.count == 1 else "s"
    engines = f"{setup.engines.count:,} engine{plural} of {setup.engines.max_num_seqs:,} sequences"
    what = f"{setup.prompts:,} prompts x {setup.group_size:,} responses a round, {mean:,.0f} tokens each in the mean"
    lines = [
        f"{what} ({source}), on {engines}",
        f"{len(of_all):,} rounds, of which the figures are {counted}",
        "",
        " " * _WIDTH + "".join(f"{name:>{_column(name)}}" for name in played),
    ]
    for row, value, form in (*ROWS, SHARED) if setup.colocated else ROWS:
        cells = (_written(fmean(value(of) for of in rounds[1:] or rounds), form) for rounds in played.values())
        lines.append(f"{row:{_WIDTH}}" + "".join(f"{cell:>{_column(name)}}" for name, cell in zip(played, cells, strict=True)))
    if setup.colocated:
        lines += ["", "One step off is left out: it needs engines on devices of their own (rollout.placement=disaggregated)."]
    return [*lines, "", "megatron-r1 grpo runs synchronous rounds; the other columns are what a change of that would bring."]


def _written(value: float, form: str) -> str:
    if form == _SECONDS:
        form = ",.0f" if value >= 1000 else ".1f" if value >= 10 else ".3f"
    return f"{value:{form}}"


def _column(name: str) -> int:
    return max(len(name) + 2, 14)
