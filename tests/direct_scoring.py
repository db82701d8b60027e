"""Scoring in this process, for tests that are not about worker processes."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.compose import Composition, ModelReward, fill_rewards
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import build_scorer, scorer_specs
from megatron_r1.types import RolloutGroup


class DirectScoring:
    """The rule scorers of a config, without processes and time limits."""

    def __init__(self, config: RewardConfig, *names: str, template: str = "r1_zero", opening: str | None = None) -> None:
        self._specs = scorer_specs(config, names or ("math", "format"), template, opening)
        self._scorers = {name: build_scorer(spec.target, spec.settings) for name, spec in self._specs.items()}

    def submit(self, scorer: str, response: str, reference: Any = None) -> Future[Verdict]:
        """See `ScoringService`."""
        future: Future[Verdict] = Future()
        future.set_result(self._scorers[scorer].score(self._specs[scorer].opening + response, reference))
        return future


def score_groups(
    config: RewardConfig, groups: list[RolloutGroup], model_reward: ModelReward | None = None, *names: str
) -> list[RolloutGroup]:
    """Fill the rewards of the groups, which are given back."""
    composition = Composition(config, DirectScoring(config, *names), model_reward)
    for group, verdicts in zip(groups, composition.collect(groups), strict=True):
        fill_rewards(config, group, verdicts)
    return groups
