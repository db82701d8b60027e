"""Packs sequences whose last token is scored. Those of one example, such as the two of a pair, stay in one micro-batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatron_r1.data.packing import MicroBatches, assign_bins, close_row
from megatron_r1.errors import DataError
from megatron_r1.types import PADDING, MicroBatch, round_up


@dataclass(frozen=True)
class ScoredExample:
    """What a reward model is trained on: sequences that end with the end of sequence, where their score is read."""

    sequences: tuple[Sequence[int] | np.ndarray, ...]  #: (chosen, rejected), or the one response
    safe: bool = True  #: the label of a single response
    name: str = ""  #: file and line, for messages
    home: int | None = None  #: see `TrainingSample.home`

    @property
    def num_tokens(self) -> int:
        """Positions that the example occupies in a packed micro-batch."""
        return sum(map(len, self.sequences))


def pack_examples(
    examples: Sequence[ScoredExample], *, max_tokens: int, dp_size: int, pad_multiple: int, count_multiple: int = 1,
    sequence_multiple: int = 1,
) -> list[MicroBatches]:  # fmt: skip
    """Every example once, in micro-batches of one padded length, the same way as `pack_samples`.

    A sequence's sample id is its place in `[sequence for example in examples for sequence in example.sequences]`; `loss_mask` is 1
    at the last token of every sequence, and there are no labels.

    Args: see `pack_samples`. If an example fits but for the padding behind its sequences, micro-batches have room for that, too.

    Raises:
        DataError: an example does not fit into `max_tokens`.
    """
    if not examples:
        raise ValueError("nothing to pack")
    lengths = [example.num_tokens for example in examples]
    for index, length in enumerate(lengths):
        if length > max_tokens:
            raise DataError(f"example {index} has {length} tokens, more than micro_batch_tokens={max_tokens}; raise it")
    homes = [example.home for example in examples if example.home is not None]
    places = [sum(round_up(len(sequence), sequence_multiple) for sequence in example.sequences) for example in examples]
    bins_per_rank, size = assign_bins(
        places, homes or None, max_tokens=max(round_up(max_tokens, sequence_multiple), *places), dp_size=dp_size,
        pad_multiple=pad_multiple, count_multiple=count_multiple,
    )  # fmt: skip
    firsts = [0]
    for example in examples:
        firsts.append(firsts[-1] + len(example.sequences))
    longest = max(len(sequence) for example in examples for sequence in example.sequences)

    def fill(chosen: list[int]) -> MicroBatch:
        sequences = [(firsts[i] + k, s) for i in chosen for k, s in enumerate(examples[i].sequences)]
        return _fill_scored_row(sequences, size, longest, sequence_multiple)

    return [MicroBatches(bins, fill) for bins in bins_per_rank]


def last_token_values(micro_batch: MicroBatch, values_1N: torch.Tensor) -> torch.Tensor:
    """[S] the value at the last token of each sequence, without padding, in the order of the micro-batch; keeps the gradient."""
    assert micro_batch.cu_seqlens is not None, "only packed micro-batches have last tokens"
    last = micro_batch.cu_seqlens[:-1] + micro_batch.sequence_tokens() - 1
    return values_1N[0, last[torch.tensor(micro_batch.is_real, dtype=torch.bool, device=last.device)]]


def unpack_last_values(micro_batch: MicroBatch, values_1N: torch.Tensor) -> dict[int, torch.Tensor]:
    """The values of `last_token_values` as {sample id: scalar}."""
    ids = [sample_id for sample_id in micro_batch.sample_ids if sample_id != PADDING]
    return dict(zip(ids, last_token_values(micro_batch, values_1N).unbind(), strict=True))


def _fill_scored_row(sequences: list[tuple[int, Sequence[int] | np.ndarray]], size: int, longest: int, multiple: int) -> MicroBatch:
    row = MicroBatch(
        token_ids=torch.zeros(1, size, dtype=torch.int64),
        labels=torch.zeros(1, size, dtype=torch.int64),
        loss_mask=torch.zeros(1, size),
        position_ids=torch.zeros(1, size, dtype=torch.int64),
        sample_ids=[number for number, _ in sequences],
    )
    bounds = [0]
    for _, token_ids in sequences:
        start, end = bounds[-1], bounds[-1] + len(token_ids)
        row.token_ids[0, start:end] = torch.as_tensor(np.asarray(token_ids))
        row.position_ids[0, start:end] = torch.arange(len(token_ids))
        row.loss_mask[0, end - 1] = 1
        row.lengths.append(end - start)
        bounds.append(round_up(end, multiple))
    close_row(row, bounds, round_up(longest, multiple))
    return row
