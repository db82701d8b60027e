"""The interface of rollout engines for everything above this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_r1.rollout.prompt_queue import Take
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from megatron_r1.weights.shard_plan import WeightSource

OnGroup = Callable[[RolloutGroup], None]  #: is called with a group as soon as its last response is sampled


@dataclass(frozen=True)
class SyncReport:
    """One weight update, as the engine confirmed it."""

    version: int  #: the trainer's weights version that the engine now holds
    num_tensors: int  #: Hugging Face tensors of the engine's model
    num_bytes: int  #: of these, each once
    num_verified: int  #: tensors of which every shard's checksum in the engine was compared; 0 with verification off
    seconds: float  #: the whole update
    verify_seconds: float  #: of which spent, when all had come, on what must fit it
    received_bytes: tuple[int, ...] = ()  #: that each worker was given
    held_bytes: tuple[int, ...] = ()  #: of what each worker holds


class RolloutEngine(Protocol):
    """Samples responses from the weights that it was given last."""

    def load_weights(self, weights: WeightSource, version: int) -> SyncReport:
        """Replace all weights.

        Args:
            weights: every tensor of the model, held by all ranks together.
            version: what `RolloutGroup.weights_version` says from now on.

        Raises:
            WeightSyncError: the engine does not hold exactly what was sent; the message names the tensors.
            RolloutError: the engine died or refused.
        """

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """Sample `sampling.responses` responses to every prompt. All ranks call it with the same prompts.

        Returned, in the order of `prompts`, are the groups that engines of this rank sampled: it owns them. `on_group` is called
        with each of these in the order in which they are finished; it should return at once.

        The same weights, prompts, sampling and seed give the same tokens and log-probs, also in another process.

        Raises:
            RolloutError: a prompt that is too long or has token ids outside the vocabulary (the message names it).
            EngineLost: the engine is dead or does not answer; its `finished` are the groups that are there.
        """

    def metrics(self) -> dict[str, float]:
        """Of the last `generate`.

        rollout/idle: share of the engines' time in which they waited for the one that was done last; 0 if there is one.
        """

    def sleep(self) -> None:
        """Give device memory back if the engine is one that does (`rollout.sleep`). The next call must be `load_weights`.

        Raises:
            EngineLost: as for `generate`.
        """

    def close(self) -> None:
        """Stop the engine and free what it holds. Safe to call twice."""


class SingleEngine(Protocol):
    """One of several engines that share a batch."""

    def load_weights(self, weights: WeightSource, version: int, transfer: WeightTransfer) -> SyncReport:
        """See `RolloutEngine.load_weights`. Collective with `transfer.give` on the ranks without an engine.

        Args:
            transfer: this rank's.
        """

    def sample(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, take: Take, on_group: OnGroup | None = None
    ) -> dict[int, RolloutGroup]:
        """The groups of the prompts that this engine takes from the batch, by position; see `RolloutEngine.generate`.

        A response depends on its prompt's position in the batch and not on the engine, apart from the last bits of its log-probs:
        they depend on what is computed beside it.

        Args:
            prompts: the whole batch.
            take: asked for more while others are computed, until nothing is left.
        """

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""
