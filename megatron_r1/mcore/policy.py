"""The trained policy: updates on packed samples, and log-probabilities, on any layout.

It knows no algorithm: `train_step` takes a loss callable. Every rank is given the whole minibatch and computes its own share, of
which alone it needs tokens and log-probs (`place`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import numpy as np
import torch

from megatron_r1.data.packing import PADDING, MicroBatches, pack_samples, unpack_token_values
from megatron_r1.mcore.megatron_model import Beside, LossFn, MegatronModel, StepStats
from megatron_r1.mcore.nonfinite import live_state
from megatron_r1.mcore.offload import borrowing, exchange, host_memory
from megatron_r1.mcore.reference_room import ReferenceRoom, goes_beside
from megatron_r1.runtime.distributed import world_size
from megatron_r1.runtime.exchange import gather_numbers
from megatron_r1.types import MicroBatch, TrainingSample

#: Field of a training sample -> a number for each target of each sample, on the ranks that computed them; None elsewhere.
Found = dict[str, list[torch.Tensor | None]]


class MegatronPolicy(MegatronModel):
    """pi_theta on Megatron-Core. Its loss callables are given the log-probs of the labels.

    Args:
        settings: see `MegatronModel`.
        temperature: log-probs are those of softmax(logits / temperature), the distribution that the engine samples from.
        share_prompts: compute the prompt of a group's responses once for each micro-batch that holds several of them, in updates
            and log-probs. `shared_prompts.shares_prompts` says where that is exact.
        exact_entropy: measure the entropy of the distribution that every trained token is from, in updates: "entropy/exact".
    """

    def __init__(
        self,
        *settings: Any,
        temperature: float = 1.0,
        share_prompts: bool = False,
        exact_entropy: bool = False,
        **more_settings: Any,
    ) -> None:
        self._share_prompts = share_prompts
        super().__init__(*settings, **more_settings)
        for module in self.modules:
            module.logit_temperature, module.measures_entropy = temperature, exact_entropy

    def train_step(
        self,
        samples: list[TrainingSample],
        loss_fn: LossFn,
        gate: Callable[[Found], str | None] | None = None,
        reference: ReferencePolicy | None = None,
    ) -> StepStats:
        """One policy update on a whole minibatch of sequences, packed over data-parallel ranks and micro-batches.

        Args:
            gate: called with what `logprobs` would give as "old_logprobs", found by the update's own forward pass, when all
                gradients are there and nothing else has changed. What it raises, on all ranks alike, leaves weights, moments and
                counters as they were; a problem that it returns leaves the update out.
            reference: it evaluates each micro-batch before its forward pass, for the loss and, as "ref_logprobs", for the gate.
        """
        micro_batches = list(self._pack(samples))
        found: dict[int, torch.Tensor] = {}
        of_reference: dict[int, torch.Tensor] = {}

        def keep(logprobs: torch.Tensor, micro_batch: MicroBatch):
            found.update(unpack_token_values(micro_batch, logprobs.detach().float().cpu()))
            return loss_fn(logprobs, micro_batch)

        def look() -> str | None:
            if gate is None:
                return None
            values = {"old_logprobs": found} | ({} if reference is None else {"ref_logprobs": of_reference})
            return gate({name: _in_order(numbers, samples) for name, numbers in values.items()})

        def name_of(micro_batch: MicroBatch, row: int, position: int) -> str:
            number = micro_batch.sample_at(position)
            return "padding" if number == PADDING else samples[number].name or f"sample {number} of the batch"

        loss = loss_fn if gate is None else keep
        if reference is None:
            return self.train_on_micro_batches(micro_batches, loss, name_of, look)
        with reference.at_hand() as state:
            return self.train_on_micro_batches(micro_batches, loss, name_of, look, self._beside(state, of_reference))

    def logprobs(self, samples: list[TrainingSample]) -> list[torch.Tensor | None]:
        """log pi_theta of every target with loss of every sample: [T-1] float32 each, on the CPU; elsewhere any finite number.

        They stay where they were computed: on the last pipeline stage of a sample's share. Other ranks get None.
        """
        return _in_order(self.evaluate(self._pack(samples), unpack_token_values), samples)

    def logprobs_beside(
        self, samples: list[TrainingSample], state: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """What `logprobs` gives with the own weights and with those of `state`, in one walk over the micro-batches.

        Args:
            state: tensors like `local_state`, on the same device.
        """
        others: dict[int, torch.Tensor] = {}
        found = self.evaluate(self._pack(samples), unpack_token_values, self._beside(state, others))
        return _in_order(found, samples), _in_order(others, samples)

    def _beside(self, state: list[torch.Tensor], found: dict[int, torch.Tensor]) -> Beside:
        """Evaluates micro-batches with other weights: into the field "ref_logprobs", and sample by sample into `found`."""
        self.gather_late_weights()
        live = live_state(self.modules)

        def run(forward: Callable[[], torch.Tensor], micro_batch: MicroBatch) -> dict[str, torch.Tensor]:
            with torch.no_grad(), borrowing(live, state):
                logprobs_1N = forward().float()
            found.update(unpack_token_values(micro_batch, logprobs_1N.cpu()))
            # Packing writes zeros where no sample is.
            return {"ref_logprobs": torch.where(micro_batch.of_samples(), logprobs_1N, 0.0)}

        return run

    def place(self, samples: list[TrainingSample], batches: Sequence[Sequence[int]]) -> list[TrainingSample]:
        """The samples, each with its arrays on the ranks that train on it in these minibatches, and there alone. Collective.

        A minibatch is divided over data-parallel ranks as packing divides it. Samples that are there already do not move; in a
        further epoch, whose minibatches are others, they may.

        Args:
            batches: minibatches of sample numbers, each number in one.
        """
        within = self.micro_batch_tokens if self._share_prompts else None
        return self.shares.place(samples, self.shares.assign(samples, batches, within, self.layout.sequence_multiple))

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
            sequence_multiple=self.layout.sequence_multiple,
            share_prompts=self._share_prompts,
        )
        return per_rank[self.shares.number]

    @property
    def absent_bytes(self) -> int:
        """What the next update takes on the device before it begins."""
        return 0 if self.optimizer is None else self._state.absent_bytes

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


def _in_order(found: Mapping[int, torch.Tensor], samples: Sequence[TrainingSample]) -> list[torch.Tensor | None]:
    return [found.get(number) for number in range(len(samples))]


class ReferencePolicy:
    """pi_ref: a frozen copy of the policy's weights, with which the policy's modules are evaluated.

    It costs one copy of the local shard, on the host if `runtime.offload` names the reference, instead of a second model.

    Args:
        resident: see `grpo.reference_resident`.

    Raises:
        ConfigError: "always", where both sets of weights cannot be used in turn.
    """

    def __init__(self, policy: MegatronPolicy, resident: Literal["auto", "always", "never"] = "auto") -> None:
        self._policy = policy
        self._choice = resident if goes_beside(resident, policy.layout, policy.switches) else "never"
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

    def fits_beside(self) -> bool:
        """Whether the next walk over micro-batches can hold both models' weights on the device, as on all ranks. Collective."""
        if self._choice != "auto" or self._policy.device.type == "cpu":
            return self._choice != "never"
        missing = sum(kept.nbytes for kept in self.state if kept.device.type != self._policy.device.type)
        spare = ReferenceRoom.of(self._policy, absent=self._policy.absent_bytes, reference=missing).spare
        return bool((gather_numbers([spare]) if world_size() > 1 else np.array([spare])).min() >= 0)

    def logprobs_of_both(self, samples: list[TrainingSample]) -> tuple[list[torch.Tensor | None], list[torch.Tensor | None]]:
        """Log-probs of the policy, and of the reference: in one walk over the micro-batches if `fits_beside`, else in two."""
        if not self.fits_beside():
            return self._policy.logprobs(samples), self.logprobs(samples)
        with self.at_hand() as state:
            return self._policy.logprobs_beside(samples, state)

    @contextmanager
    def at_hand(self) -> Iterator[list[torch.Tensor]]:
        """The state on the policy's device, during the block."""
        yield [kept.to(self._policy.device, non_blocking=True) for kept in self.state]
