"""The total reward of a response: a weighted sum of named rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megatron_r1.config.schema import RewardConfig
from megatron_r1.rewards.accuracy import AccuracyReward
from megatron_r1.rewards.format import FormatReward
from megatron_r1.rewards.protocol import Reward
from megatron_r1.types import RolloutGroup

RewardFn = Callable[[RolloutGroup], None]  #: fills `rewards_G` and `reward_parts`


def build_reward(config: RewardConfig) -> RewardFn:
    """Reward_rule = Reward_accuracy + Reward_format (v2 equation 4), with the weights of the config."""
    return weighted_sum([(config.accuracy_weight, AccuracyReward(config.answer_location)), (config.format_weight, FormatReward())])


def weighted_sum(rewards: Sequence[tuple[float, Reward]]) -> RewardFn:
    """Score every response of a group; a reward of weight 0 is measured but does not count."""

    def fill(group: RolloutGroup) -> None:
        scores = {reward.name: [reward.score(group.prompt, rollout) for rollout in group.rollouts] for _, reward in rewards}
        group.reward_parts = scores
        group.rewards_G = sum(weight * torch.tensor(scores[reward.name], dtype=torch.float64) for weight, reward in rewards)

    return fill
