"""The work in a micro-batch does not depend on how it is packed."""

from __future__ import annotations

import torch

from megatron_r1.data.packing import pack_samples
from megatron_r1.mcore.counts import work_of
from megatron_r1.model.flops import Work, rows_of
from megatron_r1.types import PROMPT, MicroBatch, TrainingSample


def test_rows() -> None:
    ids = torch.zeros(2, 6, dtype=torch.int64)
    assert work_of(MicroBatch(ids, ids, torch.ones(2, 6), ids)) == rows_of(2, 6)


def test_packed_without_padding() -> None:
    lengths = (5, 3, 7)
    samples = [TrainingSample([3] * (length + 1), [0] + [1] * (length - 1)) for length in lengths]
    expected = Work(sum(lengths), sum(length * (length + 1) // 2 for length in lengths), sum(lengths) - len(lengths))
    for capacity in (8, 15, 40):
        found = [work_of(m) for m in pack_samples(samples, max_tokens=capacity, dp_size=1, pad_multiple=8)[0]]
        assert Work(*(sum(getattr(work, name) for work in found) for name in ("tokens", "pairs", "predicted"))) == expected


def test_a_shared_prompt_counts_once() -> None:
    prompt, answers = [5] * 6, (3, 4)
    first = len(prompt) - 1
    samples = [TrainingSample(prompt + [7] * length, slice(first, first + length), group=0) for length in answers]
    (micro_batch,) = pack_samples(samples, max_tokens=64, dp_size=1, pad_multiple=4, share_prompts=True)[0]
    apart = work_of(pack_samples(samples, max_tokens=64, dp_size=1, pad_multiple=4)[0][0])
    shared = work_of(micro_batch)
    assert micro_batch.prompts, "the prompt is shared"
    once = int(micro_batch.cu_seqlens.diff()[micro_batch.sample_ids.index(PROMPT)])
    assert apart.tokens - shared.tokens == once
    assert apart.pairs - shared.pairs == once * (once + 1) // 2
    assert apart.predicted == shared.predicted == sum(answers)
