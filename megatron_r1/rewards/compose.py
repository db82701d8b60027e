"""The total reward of a response: a weighted sum of named components, chosen by the prompt's kind.

    reasoning: accuracy + format + language   (R1 v2 (arXiv) equations 4 and 7: Reward_rule, the language reward "directly added")
    general:   model + format + language      (R1 v2 equations 8 and 10: a reward model or a judge in place of a rule)

Both may have further components: the rewards of `reward.custom`, and `length` and `repetition` if they are switched on (see
`rules/penalties.py`). The prompt's domain names the scorer of its accuracy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait

import torch

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import RewardError
from megatron_r1.rewards.protocol import Grader, ScoringService, Verdict
from megatron_r1.rewards.rules.penalties import length_penalty, repetition_penalty
from megatron_r1.rewards.rules.visible import has_visible
from megatron_r1.rewards.scorers import accuracy_reference, accuracy_scorer, custom_components, is_custom
from megatron_r1.tags import find_summary, whole_response
from megatron_r1.types import Prompt, Rollout, RolloutGroup

COMPONENTS = {"reasoning": ("accuracy", "format", "language"), "general": ("model", "format", "language")}

_WAIT_SECONDS = 5.0

ModelReward = Callable[[Prompt, Rollout], Future[Verdict]]  #: starts scoring one response with a model and returns at once
Verdicts = dict[str, list[Verdict]]  #: component -> [G]


class Composition:
    """Starts scoring every component of a group's rewards, and collects the verdicts later.

    Args:
        model_reward: the model component of general prompts; None: there are none, or reward models score them elsewhere.
    """

    def __init__(self, config: RewardConfig, scoring: ScoringService, model_reward: ModelReward | None = None) -> None:
        self._config, self._scoring, self._model_reward = config, scoring, model_reward
        self._started: dict[int, tuple[RolloutGroup, dict[str, list[Future[Verdict]]]]] = {}  # by id(group), which it keeps alive

    def submit(self, group: RolloutGroup) -> None:
        """Start scoring a group; returns at once.

        Raises:
            RewardError: no reward is made for the prompt's kind, or no scorer is set for its domain.
        """
        components = [name for name in _components(self._config, group.prompt) if self._is_measured(name)]
        futures = {name: [self._start(name, group.prompt, rollout) for rollout in group.rollouts] for name in components}
        self._started[id(group)] = (group, futures)

    def collect(self, groups: Sequence[RolloutGroup], on_wait: Callable[[], None] = lambda: None) -> list[Verdicts]:
        """Wait for the verdicts on these groups, in the order of the groups. Submits those that `submit` has not seen.

        Args:
            on_wait: called every few seconds: the tests of programs can take long.
        """
        for group in groups:
            if id(group) not in self._started:
                self.submit(group)
        started = [self._started.pop(id(group))[1] for group in groups]
        return [{name: [_result(future, on_wait) for future in row] for name, row in futures.items()} for futures in started]

    def _is_measured(self, component: str) -> bool:
        """The language reward is measured at a weight other than 0 alone, the format if there is one, all others at any weight."""
        if component == "model":
            return self._config.model != "reward_models"
        if component == "format":
            return self._config.format != "none"
        return component != "language" or self._config.language_weight != 0

    def _start(self, component: str, prompt: Prompt, rollout: Rollout) -> Future[Verdict]:
        scorer = accuracy_scorer(self._config, prompt) if component == "accuracy" else component
        if is_custom(self._config, scorer):  # the function itself decides what a response is worth that was cut
            reference = accuracy_reference(self._config, scorer, prompt, cut=not rollout.finished)
            return self._scoring.submit(scorer, rollout.text, reference)
        if not rollout.finished:
            return _now(Verdict(0.0, "wrong", "cut at the length limit"))
        if component == "model":
            if self._model_reward is None:
                raise RewardError(
                    f"prompt {prompt.id!r} is of kind 'general' and reward.model is none: set it, or leave such prompts out"
                )
            return self._model_reward(prompt, rollout)
        if component == "accuracy":
            return self._scoring.submit(scorer, rollout.text, accuracy_reference(self._config, scorer, prompt))
        if component == "language" and not prompt.language:
            return _now(Verdict(None, "unscorable", "the prompt names no language"))
        return self._scoring.submit(component, rollout.text, prompt.language if component == "language" else None)


def judge_reward(judge: Grader) -> ModelReward:
    """The model component as a judge gives it. The judge sees only what follows the reasoning: the final summary.

    (R1 v2 section 3.1 scores helpfulness on the final summary only.)
    """

    def grade(prompt: Prompt, rollout: Rollout) -> Future[Verdict]:
        if not prompt.answer.strip():
            return _now(Verdict(None, "unscorable", "there is no reference answer to judge by"))
        summary = find_summary(whole_response(prompt.text, rollout.text))
        if summary is None or not has_visible(summary):
            return _now(Verdict(0.0, "wrong", "nothing follows the reasoning"))
        return judge.grade(prompt.question, prompt.answer, summary)

    return grade


def fill_rewards(config: RewardConfig, group: RolloutGroup, verdicts: Verdicts) -> None:
    """Fill `rewards_G`, `reward_magnitude`, `reward_parts`, `reward_outcomes` and `reward_details` of a scored group.

    A component without a score counts as `config.unscored_value` in the total; in `reward_parts` it stays None.
    """
    weights = {
        "accuracy": config.accuracy_weight,
        "format": config.format_weight,
        "language": config.language_weight,
        "model": config.model_weight,
        "length": config.length_penalty_weight,
        "repetition": config.repetition_penalty_weight,
    } | {custom.name: custom.weight for custom in config.custom}
    group.reward_parts = {name: [verdict.score for verdict in row] for name, row in verdicts.items()} | _penalties(config, group)
    group.reward_outcomes = {name: [verdict.outcome for verdict in row] for name, row in verdicts.items()}
    group.reward_details = {name: [verdict.detail for verdict in row] for name, row in verdicts.items()}
    group.rewards_G = torch.zeros(len(group.rollouts), dtype=torch.float64)
    magnitudes_G = torch.zeros_like(group.rewards_G)
    for name, scores in group.reward_parts.items():
        counted = [config.unscored_value if score is None else score for score in scores]
        component_G = weights[name] * torch.tensor(counted, dtype=torch.float64)
        group.rewards_G += component_G
        magnitudes_G += component_G.abs()
    group.reward_magnitude = magnitudes_G.max().item()


def describe_rewards(groups: Sequence[RolloutGroup]) -> dict[str, float]:
    """Metrics of a scored batch.

    reward/mean: of the totals; reward/<name>: of the component, over the responses that have a score;
    reward/outcome/<name>/<error, timeout, unscorable>: share of the responses without one;
    reward/all_correct_groups, reward/all_wrong_groups: shares of the groups with an accuracy whose answers are all right or all
    wrong, from which nothing is learned about accuracy.
    """
    metrics = {"reward/mean": _mean_score([r for g in groups for r in g.rewards_G.tolist()])}
    for name in {name: None for g in groups for name in g.reward_parts}:
        scores = [s for g in groups for s in g.reward_parts.get(name, []) if s is not None]
        if scores:
            metrics[f"reward/{name}"] = _mean_score(scores)
    for name in {name: None for g in groups for name in g.reward_outcomes}:
        outcomes = [o for g in groups for o in g.reward_outcomes.get(name, [])]
        for outcome in ("error", "timeout", "unscorable"):
            metrics[f"reward/outcome/{name}/{outcome}"] = outcomes.count(outcome) / len(outcomes)
    accuracies = [set(g.reward_outcomes["accuracy"]) for g in groups if g.reward_outcomes.get("accuracy")]
    if accuracies:
        for outcome in ("correct", "wrong"):
            metrics[f"reward/all_{outcome}_groups"] = accuracies.count({outcome}) / len(accuracies)
    return metrics


def _components(config: RewardConfig, prompt: Prompt) -> list[str]:
    if prompt.kind not in COMPONENTS:
        raise RewardError(f"prompt {prompt.id!r} is of kind {prompt.kind!r}; rewards are made for {', '.join(COMPONENTS)}")
    if prompt.kind == "reasoning":
        accuracy_scorer(config, prompt)  # raises RewardError for an unknown domain
    return [*COMPONENTS[prompt.kind], *(custom.name for custom in custom_components(config, prompt.kind))]


def _penalties(config: RewardConfig, group: RolloutGroup) -> dict[str, list[float]]:
    """The penalties that are switched on. Responses that were cut at the length limit get them, too."""
    penalties = {}
    tokens = [rollout.token_ids for rollout in group.rollouts]
    if config.length_penalty_weight:
        arguments = (config.length_penalty_max_tokens, config.length_penalty_cache_tokens)
        penalties["length"] = [length_penalty(len(token_ids), *arguments) for token_ids in tokens]
    if config.repetition_penalty_weight:
        penalties["repetition"] = [repetition_penalty(token_ids.tolist(), config.repetition_ngram) for token_ids in tokens]
    return penalties


def _result(future: Future[Verdict], on_wait: Callable[[], None]) -> Verdict:
    while not wait([future], _WAIT_SECONDS).done:
        on_wait()
    return future.result()


def _now(verdict: Verdict) -> Future[Verdict]:
    future: Future[Verdict] = Future()
    future.set_result(verdict)
    return future


def _mean_score(values: Sequence[float]) -> float:
    return sum(values) / len(values)
