"""The reward model on Megatron-Core: updates on packed examples, and scores of any number of responses, on any layout.

Every rank is given the whole batch and computes its own share, as with the policy. Responses that are scored go from the ranks that
sampled them to those that compute their scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np

from megatron_r1.data.packing import PADDING, MicroBatches, distribute
from megatron_r1.data.reward_packing import ScoredExample, pack_examples, unpack_last_values
from megatron_r1.errors import DataError
from megatron_r1.mcore.megatron_model import LossFn, MegatronModel, StepStats
from megatron_r1.mcore.offload import Shelf
from megatron_r1.runtime.distributed import failing_together, rank
from megatron_r1.runtime.exchange import add_tables, gather_numbers
from megatron_r1.types import MicroBatch, TrainingSample, hollow


class MegatronRewardModel(MegatronModel):
    """r_phi: the policy's trunk under a scalar head. Its loss callables are given a score for every token."""

    _OUTPUT = "score"
    _rest: Shelf | None = None

    def rest_on_host(self) -> None:
        """Have the weights on the device during `scores` alone, so that several models take the memory of one."""
        live = [parameter for module in self.modules for parameter in module.parameters()]
        biases = (named for module in self.modules for named in module.named_buffers())
        live += [buffer for name, buffer in biases if name.endswith("expert_bias")]
        self._rest = Shelf(live, self.device, constant=True)
        self._rest.to_host()

    def train_step(self, examples: list[ScoredExample], loss_fn: LossFn) -> StepStats:
        """One update on a whole batch, packed over data-parallel ranks and micro-batches.

        Raises:
            DataError: an example has more tokens than a micro-batch.
        """
        names = [example.name or f"example {i} of the batch" for i, example in enumerate(examples) for _ in example.sequences]

        def name_of(micro_batch: MicroBatch, row: int, position: int) -> str:
            number = micro_batch.sample_at(position)
            return "padding" if number == PADDING else names[number]

        return self.train_on_micro_batches(list(self._pack(examples, self.micro_batch_tokens)), loss_fn, name_of)

    def scores(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> list[float]:
        """r_phi at the last token of each sequence; all ranks pass the same. One longer than a micro-batch gets one of its size.

        Raises:
            DataError: a sequence has more tokens than the model has positions.
        """
        self._check_lengths(sequences)
        return self._score([ScoredExample((sequence,)) for sequence in sequences]).tolist()

    def own_scores(self, sequences: Sequence[np.ndarray]) -> list[float]:
        """As `scores`, of the sequences [T] int32 of this rank; the others pass their own, and all call it together."""
        with failing_together():
            self._check_lengths(sequences)
        counts = gather_numbers([len(sequences)])[:, 0].astype(int)
        holders = np.repeat(np.arange(len(counts)), counts).tolist()
        first = int(counts[: rank()].sum())
        own = slice(first, first + len(sequences))
        table = np.zeros(len(holders))
        table[own] = [len(sequence) for sequence in sequences]
        lengths = add_tables(table).astype(int).tolist()
        samples = [
            TrainingSample(hollow(length, np.int32), slice(0, length - 1), holder=holder)
            for length, holder in zip(lengths, holders, strict=True)
        ]
        for number, sequence in enumerate(sequences, first):
            samples[number] = replace(samples[number], token_ids=sequence)
        placed = self.shares.place(samples, distribute(lengths, self.layout.dp))
        return self._score([ScoredExample((sample.token_ids,), home=sample.home) for sample in placed])[own].tolist()

    def _check_lengths(self, sequences: Sequence[Sequence[int] | np.ndarray]) -> None:
        for index, sequence in enumerate(sequences):
            if len(sequence) > self.arch.max_position_embeddings:
                raise DataError(
                    f"response {index} has {len(sequence)} tokens with its prompt, the reward model has "
                    f"{self.arch.max_position_embeddings} positions"
                )

    def _score(self, examples: Sequence[ScoredExample]) -> np.ndarray:
        """[examples] scores, on every rank."""
        table = np.zeros(len(examples))
        if not examples:
            return table
        capacity = max(self.micro_batch_tokens, max(example.num_tokens for example in examples))
        with nullcontext() if self._rest is None else self._rest.on_device():
            found = self.evaluate(self._pack(examples, capacity), unpack_last_values)
        if self.reports:
            for number, score in found.items():
                table[number] = float(score)
        return add_tables(table)

    def _pack(self, examples: Sequence[ScoredExample], max_tokens: int) -> MicroBatches:
        """This rank's share."""
        per_rank = pack_examples(
            examples,
            max_tokens=max_tokens,
            dp_size=self.layout.dp,
            pad_multiple=self.pad_multiple,
            count_multiple=self.layout.count_multiple,
            sequence_multiple=self.layout.sequence_multiple,
        )
        return per_rank[self.shares.number]
