"""What a reward is."""

from __future__ import annotations

from typing import Protocol

from megatron_r1.types import Prompt, Rollout


class Reward(Protocol):
    """One component of the total reward."""

    name: str  #: key in `RolloutGroup.reward_parts` and, as "reward/<name>", in the metrics

    def score(self, prompt: Prompt, rollout: Rollout) -> float:
        """The reward of one response, before its weight.

        Raises:
            RewardError: the reward could not be computed; a wrong answer is 0, not an error.
        """
