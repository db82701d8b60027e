"""What the training loops ask of the engines that `pipeline/builders/` chooses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch

from megatron_r1.types import MicroBatch, Prompt, RolloutGroup, TrainingSample


class Stats(Protocol):
    """What one policy update reports."""

    loss: float
    grad_norm: float
    lr: float
    sums: dict[str, float]
    tokens: int


LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, dict[str, torch.Tensor]]]


class Policy(Protocol):
    """pi_theta. Every rank passes the whole minibatch and gets the same answer."""

    updates: int

    def train_step(self, samples: list[TrainingSample], loss_fn: LossFn) -> Stats:
        """One policy update."""

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor]:
        """Per sample [T-1] float32."""

    def weights(self) -> Iterable[tuple[str, torch.Tensor]]:
        """(Hugging Face name, full tensor); can be iterated again."""


class Reference(Protocol):
    """pi_ref."""

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor]:
        """Per sample [T-1] float32."""

    def refresh(self) -> None:
        """pi_ref <- pi_theta."""


class PromptSource(Protocol):
    """An endless stream of prompts with a cursor that can be saved."""

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON."""


class Rewards(Protocol):
    """Scores groups, while others are still being sampled."""

    def submit(self, group: RolloutGroup) -> None:
        """Start to score a group; returns at once. Called on rank 0 alone, on no rank where the group is only collected."""

    def collect(self, groups: Sequence[RolloutGroup]) -> None:
        """Wait for the scores, and fill `rewards_G` and `reward_parts`, `_outcomes` and `_details`. Called on every rank."""
