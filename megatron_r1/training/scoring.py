"""The rewards of a job of many ranks: whoever sampled a group scores it, and all ranks get the same scores or the same error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_r1.config.rewards import RewardConfig
from megatron_r1.rewards.compose import Verdicts, fill_rewards
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.runtime.waiting import give_sign
from megatron_r1.training.outlines import share_outlines
from megatron_r1.types import Prompt, RolloutGroup


class GroupScoring(Protocol):
    """A `Composition`."""

    def submit(self, group: RolloutGroup) -> None:
        """Start scoring a group."""

    def collect(self, groups: Sequence[RolloutGroup], on_wait: Callable[[], None]) -> list[Verdicts]:
        """Wait for the verdicts, and call `on_wait` now and then meanwhile."""


#: The model component of a rank's own groups: {"model": [G]} for general prompts, {} for others. All ranks call it together.
Preferences = Callable[[Sequence[RolloutGroup]], list[Verdicts]]


class CollectiveRewards:
    """`Rewards` of a job.

    Args:
        start: makes the composition of this rank, which samples, and so owns groups; None if it does not. An error of one rank is
            raised on every rank.
        preferences: reward models, which all ranks run together; None: there are none.
    """

    def __init__(
        self, config: RewardConfig, start: Callable[[], GroupScoring] | None, preferences: Preferences | None = None
    ) -> None:
        self._config, self._preferences = config, preferences
        self._scoring: GroupScoring | None = None
        with failing_together():
            self._scoring = None if start is None else start()

    def submit(self, group: RolloutGroup) -> None:
        """See `Rewards.submit`."""
        assert self._scoring is not None, "only ranks that score own groups"
        self._scoring.submit(group)

    def collect(self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """See `Rewards.collect`."""
        verdicts: list[Verdicts] = []
        with failing_together(is_long=True):
            if groups:
                assert self._scoring is not None, "only ranks that score own groups"
                verdicts = self._scoring.collect(groups, give_sign)
        preferred = [] if self._preferences is None else self._preferences(groups)
        with failing_together():
            for group, verdicts_of_group, of_models in zip(groups, verdicts, preferred or [{}] * len(groups), strict=True):
                fill_rewards(self._config, group, verdicts_of_group | of_models)
        return share_outlines(groups, prompts)
