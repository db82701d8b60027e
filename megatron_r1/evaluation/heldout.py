"""Held-out evaluation: sampled and greedy side by side, which shows sharpening apart from learning."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_r1.config.evaluation import EvaluateConfig
from megatron_r1.config.rewards import RESERVED_NAMES
from megatron_r1.evaluation.passk import mean, pass_at_k, wilson_interval
from megatron_r1.types import Prompt, RolloutGroup, Sampling, SamplingEngine

FORMAT_FIELDS = ("format", "format_greedy")  #: of a result: None without a format that is rewarded


@dataclass(frozen=True)
class EvaluationResult:
    """Means over problems, in [0, 1] unless a field says otherwise."""

    problems: int  #: number of different problems
    k: int  #: samples per problem
    temperature: float  #: of the sampled pass
    pass_at_1: float  #: share of samples with the right answer
    pass_at_k: float  #: share of problems with a right answer among k samples
    greedy: float  #: accuracy at temperature 0
    format: float | None  #: share of samples in the required format; None if none is required
    format_greedy: float | None
    response_length: float  #: mean tokens of a sample, end of sequence included
    finished: float  #: share of samples that ended by themselves
    unscored: float  #: share of all responses whose accuracy has no score (error, timeout, unscorable)
    intervals: dict[str, tuple[float, float]]  #: 95%, for pass_at_1, pass_at_k, greedy, format, format_greedy and <name>/<share>
    #: name of each reward of `reward.custom` -> its pass_at_1, pass_at_k and greedy; a score of 1 or more is right
    custom: dict[str, dict[str, float]] = field(default_factory=dict)


def evaluate_heldout(
    engine: SamplingEngine,
    prompts: Sequence[Prompt],
    reward_fn: Callable[[Sequence[RolloutGroup], Sequence[Prompt]], list[RolloutGroup]],
    config: EvaluateConfig,
    max_tokens: int,
    on_group: Callable[[RolloutGroup], None] | None = None,
) -> EvaluationResult:
    """Sample `config.samples` responses to every prompt, and one greedy response. All ranks call this.

    Args:
        reward_fn: takes this rank's groups and all prompts, fills reward_parts with "accuracy" and, if one is rewarded, "format",
            and gives the groups of all prompts, other ranks' as outlines. A response that could not be scored is not correct, and
            counts in `unscored`.
        max_tokens: response tokens, end of sequence included.
        on_group: starts to score a group of this rank while others are sampled.

    The engine gets all requests in one call: a full batch is what makes it fast.

    The same weights, prompts and config give the same result: `config.seed` seeds the engine.
    """
    sampling = Sampling(config.samples, config.temperature, config.top_p, max_tokens, greedy=1)
    groups = reward_fn(engine.generate(prompts, sampling, config.seed, on_group), prompts)
    sampled = [_results_of(group, slice(config.samples)) for group in groups]
    greedy = [_results_of(group, slice(config.samples, None)) for group in groups]
    shares = _rates_right(sampled, greedy, "accuracy")
    names = [name for name in groups[0].reward_parts if name not in RESERVED_NAMES]
    names = [name for name in names if all(name in group.reward_parts for group in groups)]
    others = {name: _rates_right(sampled, greedy, name) for name in names}
    bounded = {f"{name}/{share}": value for name, values in others.items() for share, value in values.items()}
    form: dict[str, float] = {}
    if all("format" in group.reward_parts for group in groups):
        form = {
            "format": mean([mean(scores(group, "format")) for group in sampled]),
            "format_greedy": mean([scores(group, "format")[0] for group in greedy]),
        }
    rollouts = [rollout for group in sampled for rollout in group.rollouts]
    return EvaluationResult(
        problems=len(prompts),
        k=config.samples,
        temperature=config.temperature,
        **shares,
        **{name: form.get(name) for name in FORMAT_FIELDS},
        response_length=mean([len(rollout.token_ids) for rollout in rollouts]),
        finished=mean([float(rollout.finished) for rollout in rollouts]),
        unscored=mean([float(score is None) for group in (*sampled, *greedy) for score in group.reward_parts["accuracy"]]),
        intervals={name: wilson_interval(share, len(prompts)) for name, share in (shares | form | bounded).items()},
        custom=others,
    )


def _rates_right(sampled: Sequence[RolloutGroup], greedy: Sequence[RolloutGroup], component: str) -> dict[str, float]:
    """pass_at_1, pass_at_k and greedy of a component, by the groups of the two passes; a score of 1 or more is right."""
    right = [[score >= 1.0 for score in scores(group, component)] for group in sampled]
    return {
        "pass_at_1": mean([pass_at_k(len(row), sum(row), 1) for row in right]),
        "pass_at_k": mean([pass_at_k(len(row), sum(row), len(row)) for row in right]),
        "greedy": mean([float(scores(group, component)[0] >= 1.0) for group in greedy]),
    }


def _results_of(group: RolloutGroup, chosen: slice) -> RolloutGroup:
    """Some of a group's responses with their scores."""
    parts = {name: row[chosen] for name, row in group.reward_parts.items()}
    return RolloutGroup(group.prompt, group.rollouts[chosen], group.weights_version, reward_parts=parts)


def scores(group: RolloutGroup, component: str) -> list[float]:
    """A component's score of every response; 0 if it has none."""
    return [0.0 if score is None else score for score in group.reward_parts[component]]
