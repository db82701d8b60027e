"""The rewards of a job of many ranks: rank 0 scores, and all ranks get the same verdicts or the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.compose import Verdicts, fill_rewards
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.types import RolloutGroup


class GroupScoring(Protocol):
    """A `Composition`."""

    def submit(self, group: RolloutGroup) -> None:
        """Start scoring a group."""

    def collect(self, groups: Sequence[RolloutGroup]) -> list[Verdicts]:
        """Wait for the verdicts."""


#: The model component of every group: {"model": [G]} for general prompts, {} for others. All ranks call it with the same groups.
Preferences = Callable[[Sequence[RolloutGroup]], list[Verdicts]]


class CollectiveRewards:
    """`Rewards` of a job.

    Args:
        start: makes the composition; called on rank 0 only. Its error is raised on every rank.
        preferences: reward models, which all ranks run together; None: there are none.
    """

    def __init__(self, config: RewardConfig, start: Callable[[], GroupScoring], preferences: Preferences | None = None) -> None:
        self._config, self._preferences = config, preferences
        self._scoring: list[GroupScoring] = []  # one on rank 0, none elsewhere
        on_rank_zero(lambda: self._scoring.append(start()))

    def submit(self, group: RolloutGroup) -> None:
        """See `Rewards.submit`."""
        self._scoring[0].submit(group)

    def collect(self, groups: Sequence[RolloutGroup]) -> None:
        """See `Rewards.collect`."""
        verdicts = on_rank_zero(lambda: self._scoring[0].collect(groups))
        if self._preferences is not None:
            for verdicts_of_group, preferred in zip(verdicts, self._preferences(groups), strict=True):
                verdicts_of_group |= preferred
        for group, verdicts_of_group in zip(groups, verdicts, strict=True):
            fill_rewards(self._config, group, verdicts_of_group)
