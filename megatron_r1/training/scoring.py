"""The rewards of a job of many ranks: whoever sampled a group scores it, and all ranks get the same scores or the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.compose import Verdicts, fill_rewards
from megatron_r1.runtime.distributed import failing_together, is_rank_zero
from megatron_r1.training.outlines import share_outlines
from megatron_r1.types import Prompt, RolloutGroup


class GroupScoring(Protocol):
    """A `Composition`."""

    def submit(self, group: RolloutGroup) -> None:
        """Start scoring a group."""

    def collect(self, groups: Sequence[RolloutGroup]) -> list[Verdicts]:
        """Wait for the verdicts."""


#: The model component of a rank's own groups: {"model": [G]} for general prompts, {} for others. All ranks call it together.
Preferences = Callable[[Sequence[RolloutGroup]], list[Verdicts]]


class CollectiveRewards:
    """`Rewards` of a job.

    Args:
        start: makes the composition; called on rank 0, where its error is raised on every rank, and on other ranks when they own
            their first group.
        preferences: reward models, which all ranks run together; None: there are none.
    """

    def __init__(self, config: RewardConfig, start: Callable[[], GroupScoring], preferences: Preferences | None = None) -> None:
        self._config, self._start, self._preferences = config, start, preferences
        self._scoring: GroupScoring | None = None
        with failing_together():
            if is_rank_zero():
                self._started()

    def submit(self, group: RolloutGroup) -> None:
        """See `Rewards.submit`."""
        self._started().submit(group)

    def collect(self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """See `Rewards.collect`."""
        verdicts: list[Verdicts] = []
        with failing_together():
            if groups:
                verdicts = self._started().collect(groups)
        preferred = [] if self._preferences is None else self._preferences(groups)
        with failing_together():
            for group, verdicts_of_group, of_models in zip(groups, verdicts, preferred or [{}] * len(groups), strict=True):
                fill_rewards(self._config, group, verdicts_of_group | of_models)
        return share_outlines(groups, prompts)

    def _started(self) -> GroupScoring:
        if self._scoring is None:
            self._scoring = self._start()
        return self._scoring
