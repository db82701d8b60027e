"""The trained policy: updates on packed samples, and log-probabilities, on any layout.

It knows no algorithm: `train_step` takes a loss callable. Every rank is given the whole minibatch and computes its own share, of
which alone it needs tokens and log-probs (`place`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from megatron_r1.data.packing import PADDING, MicroBatches, pack_samples, unpack_token_values
from megatron_r1.mcore.megatron_model import LossFn, MegatronModel, StepStats
from megatron_r1.mcore.offload import exchange, host_memory
from megatron_r1.types import MicroBatch, TrainingSample


class MegatronPolicy(MegatronModel):
    """pi_theta on Megatron-Core. Its loss callables are given the log-probs of the labels.

    Args:
        settings: see `MegatronModel`.
        temperature: log-probs are those of softmax(logits / temperature), the distribution that the engine samples from.
        share_prompts: compute the prompt of a group's responses once for each micro-batch that holds several of them, in updates
            and log-probs. `shared_prompts.shares_prompts` says where that is exact.
    """

    def __init__(self, *settings: Any, temperature: float = 1.0, share_prompts: bool = False, **more_settings: Any) -> None:
        self._share_prompts = share_prompts
        super().__init__(*settings, **more_settings)
        for module in self.modules:
            module.logit_temperature = temperature

    def train_step(
        self,
        samples: list[TrainingSample],
        loss_fn: LossFn,
        gate: Callable[[list[torch.Tensor | None]], None] | None = None,
    ) -> StepStats:
        """One policy update on a whole minibatch of sequences, packed over data-parallel ranks and micro-batches.

        Args:
            gate: called with what `logprobs` would give, found by the update's own forward pass, when all gradients are there and
                nothing else has changed. What it raises, on all ranks alike, leaves weights, moments and counters as they were.
        """
        micro_batches = list(self._pack(samples))
        found: dict[int, torch.Tensor] = {}

        def keep(logprobs: torch.Tensor, micro_batch: MicroBatch):
            found.update(unpack_token_values(micro_batch, logprobs.detach().float().cpu()))
            return loss_fn(logprobs, micro_batch)

        def look() -> None:
            if gate is not None:
                gate([found.get(number) for number in range(len(samples))])

        def name_of(micro_batch: MicroBatch, row: int, position: int) -> str:
            number = micro_batch.sample_at(position)
            return "padding" if number == PADDING else samples[number].name or f"sample {number} of the batch"

        return self.train_on_micro_batches(micro_batches, loss_fn if gate is None else keep, name_of, look)

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """log pi_theta of every target with loss of every sample: [T-1] float32 each, on the CPU; elsewhere any finite number.

        They stay where they were computed: on the last pipeline stage of a sample's share. Other ranks get None.
        """
        found = self.evaluate(self._pack(samples), unpack_token_values)
        return [found.get(number) for number in range(len(samples))]

    def place(self, samples: list[TrainingSample], batches: Sequence[Sequence[int]]) -> list[TrainingSample]:
        """The samples, each with its arrays on the ranks that train on it in these minibatches, and there alone. Collective.

        A minibatch is divided over data-parallel ranks as packing divides it. Samples that are there already do not move; in a
        further epoch, whose minibatches are others, they may.

        Args:
            batches: minibatches of sample numbers, each number in one.
        """
        within = self.micro_batch_tokens if self._share_prompts else None
        return self.shares.place(samples, self.shares.assign(samples, batches, within))

    _OUTPUT = "log-probability"

    def _per_token(self, output: torch.Tensor) -> torch.Tensor:
        return -output

    def _pack(self, samples: list[TrainingSample]) -> MicroBatches:
        """This rank's share."""
        per_rank = pack_samples(
            samples,
            max_tokens=self.micro_batch_tokens,
            dp_size=self.layout.dp,
            pad_multiple=self.pad_multiple,
            count_multiple=self.layout.count_multiple,
            share_prompts=self._share_prompts,
        )
        return per_rank[self.shares.number]

    @contextmanager
    def holding(self, state: list[torch.Tensor]) -> Iterator[None]:
        """Run the block with other weights in place (same layout), which are exchanged tensor by tensor and then back.

        The device needs room for one more tensor. During the block `state` holds the own weights.
        """
        exchanged: list[tuple[torch.Tensor, torch.Tensor]] = []
        try:
            for pair in zip(state, self.local_state(), strict=True):
                exchange(*pair)
                exchanged.append(pair)
            yield
        finally:
            for pair in exchanged:
                exchange(*pair)


class ReferencePolicy:
    """pi_ref: a frozen copy of the policy's weights, swapped in to be evaluated.

    It costs one copy of the local shard, on the host if `runtime.offload` names the reference, instead of a second model.
    """

    def __init__(self, policy: MegatronPolicy) -> None:
        self._policy = policy
        of = host_memory if "reference" in policy.offloaded else torch.empty_like
        self.state = [of(t) for t in policy.local_state()]
        self.refresh()

    def refresh(self) -> None:
        """pi_ref <- pi_theta."""
        with torch.no_grad():
            for kept, own in zip(self.state, self._policy.local_state(), strict=True):
                kept.copy_(own)

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """log pi_ref of every target of every sample, as `MegatronPolicy.logprobs` gives them."""
        with self._policy.holding(self.state):
            return self._policy.logprobs(samples)
