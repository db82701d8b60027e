"""What a minibatch holds, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_r1.mcore.collectives import all_reduce
from megatron_r1.model.flops import Work, rows_of
from megatron_r1.types import PADDING, MicroBatch


@dataclass(frozen=True)
class Counts:
    """Of a whole minibatch, without padding; the same on every rank."""

    sequences: int
    trained_tokens: float
    work: Work


def count_minibatch(micro_batches: Sequence[MicroBatch], device: torch.device, group: dist.ProcessGroup) -> Counts:
    """Add up the micro-batches of all data-parallel ranks. Collective over `group`: one sum of four numbers."""
    rows = [_row_of(micro_batch) for micro_batch in micro_batches]
    total = torch.tensor(rows, dtype=torch.float64, device=device).sum(0)
    all_reduce(total, group=group)
    sequences, trained_tokens, tokens, pairs = total.tolist()
    return Counts(int(sequences), trained_tokens, Work(int(tokens), int(pairs), round(trained_tokens)))


def work_of(micro_batch: MicroBatch) -> Work:
    """What a model has to compute of a micro-batch; a prompt that responses share, once."""
    if micro_batch.cu_seqlens is None:
        rows = rows_of(*micro_batch.token_ids.shape)
        tokens, pairs = rows.tokens, rows.pairs
    else:
        real = torch.tensor([number != PADDING for number in micro_batch.sample_ids], device=micro_batch.cu_seqlens.device)
        lengths = micro_batch.sequence_tokens() * real
        tokens = int(lengths.sum())
        pairs = int((lengths * (lengths + 1) // 2 + lengths * micro_batch.prompt_tokens()).sum())
    return Work(tokens, pairs, int(micro_batch.loss_mask.count_nonzero()))


def _row_of(micro_batch: MicroBatch) -> tuple[float, ...]:
    work = work_of(micro_batch)
    return sum(micro_batch.is_real), micro_batch.loss_mask.sum(dtype=torch.float64).item(), work.tokens, work.pairs
