"""The rewards of a job: pools of scoring processes, the judge, and the measurement of held-out problems."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megatron_r1.config.rewards import JudgeConfig, RewardConfig
from megatron_r1.config.schema import Config
from megatron_r1.data.problems import ProblemSource
from megatron_r1.data.prompts import PromptWriter, heldout_prompts
from megatron_r1.errors import ConfigError, RewardError
from megatron_r1.evaluation.heldout import FORMAT_FIELDS, EvaluationResult, evaluate_heldout
from megatron_r1.pipeline.builders.placement import place_engine
from megatron_r1.pipeline.session import Session
from megatron_r1.rewards.compose import Composition, judge_reward
from megatron_r1.rewards.judge.preference import Judge
from megatron_r1.rewards.rules.format import whole_match
from megatron_r1.rewards.scorers import FORMATS, ScorerSpec, needed_scorers, scorer_specs, with_format
from megatron_r1.rewards.workers.pool import ScoringPool
from megatron_r1.rewards.workers.process import WorkerLimits
from megatron_r1.rollout.protocol import RolloutEngine
from megatron_r1.runtime.cores import SharedCores, share_cores, usable_cores
from megatron_r1.runtime.distributed import failing_together, gather_objects, on_rank_zero
from megatron_r1.runtime.files import path_of_rank
from megatron_r1.runtime.launch import child_environment
from megatron_r1.training.scoring import CollectiveRewards, Preferences

MOST_WORKERS = 64  #: of a pool that sizes itself: one thread hands out its work, and reads 128 KiB of JSON for each response
_SHORT_NAMES = {"pass_at_1": "pass@1", "pass_at_k": "pass@k"}  # in metrics.jsonl
_FIELDS = {short: field for field, short in _SHORT_NAMES.items()}
_CUSTOM = re.compile(r"eval/([^/]+)/(pass@1|pass@k|greedy)")  # what evaluations hold of a reward of reward.custom


def open_scoring(
    rewards: RewardConfig,
    specs: Mapping[str, ScorerSpec],
    log: Path | None = None,
    max_pending: int = 16384,
    workers: int | None = None,
) -> ScoringPool:
    """Scoring processes for these scorers, as a context manager.

    Args:
        workers: number of processes; None: that of a command whose one process does nothing else meanwhile.
        log: takes all output of the scoring processes.
        max_pending: responses that are taken and not scored yet.

    Raises:
        RewardError: a scorer cannot be built.
    """
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    return ScoringPool(
        specs,
        workers=workers or pool_workers(rewards.workers, SharedCores(usable_cores())),
        limits=WorkerLimits(rewards.worker_memory_bytes, rewards.worker_recycle_bytes),
        max_pending=max_pending,
        environment=child_environment(),
        log=log,
    )


def pool_workers(setting: int | None, cores: SharedCores, threads: int = 1) -> int:
    """Number of scoring processes beside one rank: `reward.workers`, or its part of the cores that the node's ranks leave free.

    Ranks that leave none share a quarter of the cores with the processes: much is scored when all is sampled.

    Args:
        cores: `users` are the ranks with a pool.
        threads: of each rank, or of its engine while it samples.
    """
    free = cores.number - cores.ranks * threads
    return setting or min(MOST_WORKERS, max(1, (free if free > 0 else cores.number // 4) // cores.users))


def judge_of_rank(judge: JudgeConfig, scoring_ranks: Sequence[int], rank: int) -> JudgeConfig:
    """The settings for one of the ranks that score: its part of the requests, at least one, and a cache that no other writes."""
    share, more = divmod(judge.concurrency, len(scoring_ranks))
    share += scoring_ranks.index(rank) < more
    cache = None if judge.cache is None else str(path_of_rank(Path(judge.cache), rank))
    return judge.model_copy(update={"concurrency": max(1, share), "cache": cache})


def check_custom_rewards(rewards: RewardConfig) -> None:
    """Find the functions of `reward.custom` as a scoring process will, before a run builds its models. All ranks call it.

    Raises:
        ConfigError: a function is not there or cannot be called as it must be, or `reward.format_pattern` is no expression.
    """
    if rewards.format_pattern is not None:
        try:
            whole_match(rewards.format_pattern)
        except RewardError as error:
            raise ConfigError(str(error)) from None

    def check() -> None:
        specs = scorer_specs(rewards, [custom.name for custom in rewards.custom], next(iter(FORMATS)))
        try:
            open_scoring(rewards.model_copy(update={"workers": 1}), specs).close()
        except RewardError as error:
            raise ConfigError(str(error)) from None

    if rewards.custom:
        on_rank_zero(check)


def open_domain_scoring(config: Config, domains: Iterable[str], log: Path, opening: str, workers: int | None = None) -> ScoringPool:
    """Scoring processes for problems of these domains, as a context manager; see `open_scoring`.

    Args:
        opening: what every prompt already holds of its response.
    """
    rewards = with_format(config.reward, config.data.template)
    specs = scorer_specs(rewards, needed_scorers(rewards, domains), config.data.template, opening)
    # A whole rollout fits, with every component: a full queue would hold up the generation that fills it.
    max_pending = 4 * config.grpo.prompts_per_rollout * config.grpo.group_size
    return open_scoring(config.reward, specs, log, max_pending, workers)


@contextmanager
def open_rewards(
    config: Config,
    session: Session,
    source: ProblemSource,
    log: Path,
    opening: str,
    preferences: Preferences | None = None,
) -> Iterator[CollectiveRewards]:
    """The rewards for the block: scoring processes beside each rank that samples. All ranks call this.

    Args:
        source: the problems whose responses will be scored; a scorer that none of them needs is not started.
        log: takes all output of the scoring processes beside rank 0. The logs of other ranks have the rank in their name.
        opening: what every prompt already holds of its response, see `PromptWriter`.
        preferences: reward models for general prompts.
    """
    rewards, rank = with_format(config.reward, config.data.template), session.launch.rank
    if config.reward.format is None and rewards.format == "none":
        on_rank_zero(_tell_no_format)
    with failing_together():
        place = place_engine(config.rollout, session.launch, session.device.kind)
    samples = place is not None and place.has_head(rank)
    scoring_ranks = [number for number, has_engine in enumerate(gather_objects(samples)) if has_engine]
    workers = pool_workers(rewards.workers, share_cores(samples), session.threads)
    with ExitStack() as stack:

        def start() -> Composition:
            scoring = stack.enter_context(open_domain_scoring(config, source.domains(), path_of_rank(log, rank), opening, workers))
            judge = None
            if rewards.model == "judge":
                judge = stack.enter_context(Judge(judge_of_rank(rewards.judge, scoring_ranks, rank)))
            return Composition(rewards, scoring, judge_reward(judge) if judge else None)

        yield CollectiveRewards(rewards, start if samples else None, preferences)


def build_evaluation(
    config: Config, engine: RolloutEngine, rewards: CollectiveRewards, source: ProblemSource, writer: PromptWriter
) -> Callable[[int, int, int], dict[str, float]]:
    """A function of (step, last step, most tokens of a response): held-out metrics of the engine's weights.

    It measures before the first step, after the last one and every `evaluate.interval` steps. After other steps, and always with
    `evaluate.problems` 0, it returns {}.
    """
    if not config.evaluate.problems:
        return lambda step, last, max_tokens: {}
    prompts = heldout_prompts(source, writer, config.evaluate.problems, config.evaluate.seed)

    def measure(step: int, last: int, max_tokens: int) -> dict[str, float]:
        interval = config.evaluate.interval
        if step not in (0, last) and not (interval and step % interval == 0):
            return {}
        return evaluation_metrics(evaluate_heldout(engine, prompts, rewards.collect, config.evaluate, max_tokens, rewards.submit))

    return measure


def evaluation_metrics(result: EvaluationResult) -> dict[str, float]:
    """An evaluation as a line of metrics.jsonl holds it: "eval/<name>", and "eval/<name>/low" and "/high" of its intervals."""
    values = asdict(result)
    intervals, custom = values.pop("intervals"), values.pop("custom")
    metrics = {_metric_name(field): value for field, value in values.items() if value is not None}
    metrics |= {_metric_name(f"{name}/{share}"): value for name, shares in custom.items() for share, value in shares.items()}
    for field, (low, high) in intervals.items():
        metrics |= {f"{_metric_name(field)}/low": low, f"{_metric_name(field)}/high": high}
    return metrics


def read_evaluation(metrics: Mapping[str, Any]) -> EvaluationResult:
    """The evaluation that a line of metrics.jsonl holds; see `evaluation_metrics`."""
    names = {f.name: _metric_name(f.name) for f in fields(EvaluationResult) if f.name not in ("intervals", "custom")}
    custom: dict[str, dict[str, float]] = {}
    further: dict[str, str] = {}
    for metric in metrics:
        if found := _CUSTOM.fullmatch(metric):
            name, share = found[1], _FIELDS.get(found[2], found[2])
            custom.setdefault(name, {})[share] = metrics[metric]
            further[f"{name}/{share}"] = metric
    bounded = {field: name for field, name in (names | further).items() if f"{name}/low" in metrics}
    intervals = {field: (metrics[f"{name}/low"], metrics[f"{name}/high"]) for field, name in bounded.items()}
    known: dict[str, Any] = {field: metrics.get(name) if field in FORMAT_FIELDS else metrics[name] for field, name in names.items()}
    return EvaluationResult(**known, intervals=intervals, custom=custom)


def _tell_no_format() -> None:
    print(
        "reward.format: none, as data.template=tokenizer asks for no form of its own; zero, chat or custom rewards one", flush=True
    )


def _metric_name(field: str) -> str:
    custom, slash, share = field.rpartition("/")
    return f"eval/{custom}{slash}{_SHORT_NAMES.get(share, share)}"
