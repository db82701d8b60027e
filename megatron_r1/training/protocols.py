"""What the training loops ask of the engines that `pipeline/builders/` chooses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from megatron_r1.types import Metric, MicroBatch, Prompt, RolloutGroup, TrainingSample
from megatron_r1.weights.shard_plan import WeightSource


class Stats(Protocol):
    """What one update reports; the same on every rank."""

    @property
    def loss(self) -> float:
        """Over the whole minibatch."""

    @property
    def grad_norm(self) -> float:
        """Before clipping."""

    @property
    def lr(self) -> float:
        """Its learning rate."""

    @property
    def metrics(self) -> Mapping[str, Metric[float]]:
        """What the loss reported, over the whole minibatch, and the balance of experts, if it is trained."""

    @property
    def tokens(self) -> int:
        """Positions computed, padding included."""

    @property
    def flops(self) -> float:
        """What the whole minibatch costs a model of this shape, see `model.flops`."""

    @property
    def applied(self) -> bool:
        """False: it was left out, and there are no metrics. If it was not finite, loss and norm are NaN."""

    @property
    def skipped(self) -> int | None:
        """Updates of the run that were left out so far; None: none may be."""


#: Takes one number per token of a micro-batch [B, N] (a policy: log-probs of the labels; a reward model: scores), sequences
#: whole, and returns this micro-batch's part of the loss (already divided by the whole minibatch's denominator) and metrics.
LossFn = Callable[[torch.Tensor, MicroBatch], tuple[torch.Tensor, Mapping[str, Metric[torch.Tensor]]]]


#: Field of a training sample -> what `Policy.logprobs` gives.
Found = dict[str, list[torch.Tensor | None]]
#: Is given the log-probs that an update's own walk found, on every rank; returns why the update is to be left out, if it is.
Gate = Callable[[Found], str | None]


class Policy(Protocol):
    """pi_theta. All ranks call its methods together, with the same samples, whose arrays only some ranks need to hold."""

    updates: int
    micro_batch_tokens: int  #: targets that one forward pass holds; may be set between updates

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its data-parallel share: one rank of each share does."""

    def place(self, samples: list[TrainingSample], batches: Sequence[Sequence[int]]) -> list[TrainingSample]:
        """The samples, each with its arrays on the ranks that train on it in these minibatches, and there alone."""

    def train_step(self, samples: list[TrainingSample], loss_fn: LossFn, gate: Gate | None = None, reference: Any = None) -> Stats:
        """One policy update.

        Args:
            gate: called with the log-probs that the update's own forward pass found, before anything is changed. What it raises
                ends the update; a problem that it returns leaves it out.
            reference: this policy's `Reference`, which gives the loss the log-probs of each micro-batch as it comes, and the gate
                those of all; None: samples have them, or there is none.
        """

    def skip_update(self, problem: str) -> Stats:
        """Leave out one update whose data are not finite, or raise NonFiniteUpdate if no more may be left out."""

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """Per sample [T-1] float32, on the ranks that computed it; None elsewhere. A rank that `reports` has those of its share.

        Outside a sample's loss mask stands any finite number.
        """

    def check_weights(self) -> None:
        """Raises NonFiniteUpdate if a weight is NaN or infinite."""

    def offload(self) -> None:
        """Leave as much of the device to an engine as `runtime.offload` says; the next update takes it back."""

    def shards(self) -> WeightSource:
        """The weights as they are, held by all ranks together. Collective."""


class Reference(Protocol):
    """pi_ref."""

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """See `Policy.logprobs`."""

    def fits_beside(self) -> bool:
        """Whether the policy's next update can take the reference along, see `Policy.train_step`. Collective."""

    def logprobs_of_both(self, samples: list[TrainingSample]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Log-probs of the policy, and of the reference."""

    def refresh(self) -> None:
        """pi_ref <- pi_theta."""


class PretrainRows(Protocol):
    """Training rows of one phase, in an order that seed and blend alone decide."""

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """Rows by their number in the phase, ascending within a call and over the run; a rank asks for its own alone.

        Returns:
            [rows, sequence length] with loss on every target; with masked documents the same rows end to end as one.
        """

    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str:
        """Which document is at a row and a position of a micro-batch, for messages."""

    def state_dict(self) -> dict[str, Any]:
        """What a run that goes on needs, as JSON. It is rank 0's: of another rank's rows it says nothing."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave on rank 0, with rows after those. Raises DataError if the data are others.

        At the beginning of a phase it is the state at the end of the one before.
        """


class PromptSource(Protocol):
    """An endless stream of prompts with a cursor that can be saved."""

    def next(self, n: int) -> list[Prompt]:
        """The next n prompts."""

    def state_dict(self) -> dict[str, Any]:
        """The cursor, as JSON."""


class Rewards(Protocol):
    """Scores groups, while others are still being sampled."""

    def submit(self, group: RolloutGroup) -> None:
        """Start to score a group of this rank, and return at once. A group that was not submitted is scored by `collect`."""

    def collect(self, groups: Sequence[RolloutGroup], prompts: Sequence[Prompt]) -> list[RolloutGroup]:
        """Wait for the scores and fill each group's `rewards_G` and its `reward_...` fields. Every rank calls this with its own.

        Returns:
            The groups of all `prompts`, in their order: this rank's own, and outlines of the others' (`RolloutGroup`).
        """
