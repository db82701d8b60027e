"""The reward model on Megatron-Core: updates on packed examples, and scores of any number of responses, on any layout.

Every rank is given everything and computes its own share, as with the policy.
"""

from __future__ import annotations

from megatron_r1.data.packing import PADDING
from megatron_r1.data.reward_packing import ScoredExample, pack_examples, unpack_last_values
from megatron_r1.errors import DataError
from megatron_r1.mcore import parallel
from megatron_r1.mcore.megatron_model import LossFn, MegatronModel, StepStats
from megatron_r1.types import MicroBatch


class MegatronRewardModel(MegatronModel):
    """r_phi: the policy's trunk under a scalar head. Its loss callables are given a score for every token."""

    _OUTPUT = "score"

    def train_step(self, examples: list[ScoredExample], loss_fn: LossFn) -> StepStats:
        """One update on a whole batch, packed over data-parallel ranks and micro-batches.

        Raises:
            DataError: an example has more tokens than a micro-batch.
        """
        names = [example.name or f"example {i} of the batch" for i, example in enumerate(examples) for _ in example.sequences]

        def name_of(micro_batch: MicroBatch, row: int, position: int) -> str:
            number = micro_batch.sample_at(position)
            return "padding" if number == PADDING else names[number]

        return self.train_on_micro_batches(self._pack(examples, self.micro_batch_tokens), loss_fn, name_of)

    def scores(self, sequences: list[list[int]]) -> list[float]:
        """r_phi at the last token of each sequence, on every rank. A sequence longer than a micro-batch gets one of its size.

        Raises:
            DataError: a sequence has more tokens than the model has positions.
        """
        for index, sequence in enumerate(sequences):
            if len(sequence) > self.arch.max_position_embeddings:
                raise DataError(
                    f"response {index} has {len(sequence)} tokens with its prompt, the reward model has "
                    f"{self.arch.max_position_embeddings} positions"
                )
        if not sequences:
            return []
        capacity = max(self.micro_batch_tokens, max(map(len, sequences)))
        micro_batches = self._pack([ScoredExample((sequence,)) for sequence in sequences], capacity)
        return [float(score) for score in self.evaluate(micro_batches, unpack_last_values, len(sequences))]

    def _pack(self, examples: list[ScoredExample], max_tokens: int) -> list[MicroBatch]:
        """This rank's share."""
        per_rank = pack_examples(
            examples,
            max_tokens=max_tokens,
            dp_size=self.layout.dp,
            pad_multiple=self.layout.tp * 2,
            count_multiple=self.layout.pp if self.layout.vpp > 1 else 1,
        )
        return per_rank[parallel.data_parallel_rank()]
