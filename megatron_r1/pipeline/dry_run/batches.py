"""How a batch falls into micro-batches, by the packing of the real run, from lengths alone."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.data.packing import assign_bins
from megatron_r1.mcore.layout import Layout
from megatron_r1.types import round_up


@dataclass(frozen=True)
class Packing:
    """What a data-parallel rank computes in one update."""

    micro_batches: int
    width: int  #: positions of each, padding included
    filled: float  #: share of the positions of all ranks that are no padding
    idle: float  #: share of the time in which a pipeline stage waits for the first and the last micro-batch


def pack_lengths(lengths: list[int], layout: Layout, max_tokens: int) -> Packing:
    """The packing of samples with these numbers of targets, the whole batch."""
    multiple = layout.sequence_multiple
    bins, width = assign_bins(
        [round_up(length, multiple) for length in lengths],
        max_tokens=round_up(max_tokens, multiple),
        dp_size=layout.dp,
        pad_multiple=layout.pad_multiple,
        count_multiple=layout.count_multiple,
    )
    count = len(bins[0])
    return Packing(count, width, sum(lengths) / (layout.dp * count * width), idle_share(count, layout))


def idle_share(micro_batches: int, layout: Layout) -> float:
    """The bubble of the pipeline: pp - 1 turns of a stage's share of a micro-batch, beside vpp turns for every micro-batch."""
    return (layout.pp - 1) / (layout.vpp * micro_batches + layout.pp - 1)
