"""Packs samples of different lengths end to end, so that no compute goes into padding.

R1 v2 (arXiv 2501.12948v2) supplement B.1: sort the global batch by length, distribute it over the data-parallel group, fill
fixed-length chunks by best fit, equalise the number of chunks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import torch

from megatron_r1.errors import DataError
from megatron_r1.types import LOGPROBS, PADDING, MicroBatch, TrainingSample

_SHELVES = 256


class MicroBatches(Sequence[MicroBatch]):
    """Packed micro-batches of one padded length. Each is filled anew whenever it is read, so that a pass holds one at a time.

    Args:
        bins: the items of each.
        fill: makes the micro-batch of a bin.
    """

    def __init__(self, bins: list[list[int]], fill: Callable[[list[int]], MicroBatch]) -> None:
        self._bins, self._fill = bins, fill

    def __len__(self) -> int:
        return len(self._bins)

    def __getitem__(self, number):
        bins = self._bins[number]
        return [self._fill(chosen) for chosen in bins] if isinstance(number, slice) else self._fill(bins)


def pack_samples(
    samples: Sequence[TrainingSample], *, max_tokens: int, dp_size: int, pad_multiple: int, count_multiple: int = 1
) -> list[MicroBatches]:
    """Every sample once, in micro-batches of one padded length N. Planned from lengths alone; reading a micro-batch fills it.

    Args:
        samples: the global batch, the same on every rank. Only the arrays of samples in micro-batches that are read are looked at.
            If they have a `home`, they go to that data-parallel rank.
        max_tokens: targets a micro-batch may hold.
        dp_size: data-parallel ranks.
        pad_multiple: N is a multiple of this (tensor parallel with sequence parallel needs a multiple of tp).
        count_multiple: the number of micro-batches is a multiple of this (an interleaved pipeline needs a multiple of pp).

    Returns:
        The micro-batches of each data-parallel rank, equally many; a rank with fewer gets micro-batches that are all padding. N is
        the fullest micro-batch rounded up to `pad_multiple`, so at most `max_tokens` rounded up.

    Raises:
        DataError: a sample does not fit into `max_tokens`.
    """
    if not samples:
        raise ValueError("nothing to pack")
    for index, sample in enumerate(samples):
        if sample.num_targets > max_tokens:
            raise DataError(
                f"training sample {index} has {sample.num_targets} tokens, more than micro_batch_tokens={max_tokens}; raise it or "
                "shorten responses"
            )
    lengths = [sample.num_targets for sample in samples]
    homes = [sample.home for sample in samples if sample.home is not None]
    if homes and len(homes) < len(samples):
        raise ValueError("some samples have a home and some do not")
    bins_per_rank, size = assign_bins(
        lengths, homes or None, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=pad_multiple, count_multiple=count_multiple
    )
    fields = [name for name in LOGPROBS if _has_field(samples, name)]
    longest = max(lengths)
    return [MicroBatches(bins, lambda chosen: _fill_row(samples, chosen, size, longest, fields)) for bins in bins_per_rank]


def assign_bins(
    lengths: Sequence[int],
    homes: Sequence[int] | None = None,
    *,
    max_tokens: int,
    dp_size: int,
    pad_multiple: int,
    count_multiple: int,
) -> tuple[list[list[list[int]]], int]:
    """Which items share a micro-batch: equally many bins of item numbers for every data-parallel rank, and the bins' padded size.

    Args: see `pack_samples`; no length is above `max_tokens`.
        homes: the data-parallel rank of every item; None: those that `distribute` chooses.
    """
    if homes is None:
        homes = distribute(lengths, dp_size)
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    for index in _longest_first(lengths):
        ranks[homes[index]].append(index)
    bins_per_rank = [_best_fit(lengths, chosen, max_tokens) for chosen in ranks]
    num_bins = -(-max(len(bins) for bins in bins_per_rank) // count_multiple) * count_multiple
    fullest = max(sum(lengths[i] for i in chosen) for bins in bins_per_rank for chosen in bins)
    size = -(-fullest // pad_multiple) * pad_multiple
    return [bins + [[] for _ in range(num_bins - len(bins))] for bins in bins_per_rank], size


def distribute(lengths: Sequence[int], dp_size: int) -> list[int]:
    """The data-parallel rank of every item.

    Longest first, each to the rank with the fewest tokens so far (then the fewest items, then the lowest rank).
    """
    homes = [0] * len(lengths)
    loads = [(0, 0, rank) for rank in range(dp_size)]  # tokens, items, rank: a heap
    for index in _longest_first(lengths):
        tokens, items, rank = loads[0]
        heapq.heapreplace(loads, (tokens + lengths[index], items + 1, rank))
        homes[index] = rank
    return homes


def unpack_token_values(micro_batch: MicroBatch, values_1N: torch.Tensor) -> dict[int, torch.Tensor]:
    """Per-token values of a packed micro-batch as {sample id: [T-1]}, aligned like the fields of `TrainingSample`."""
    bounds = micro_batch.cu_seqlens.tolist()
    spans = zip(micro_batch.sample_ids, bounds[:-1], bounds[1:], strict=True)
    return {sample_id: values_1N[0, start:end].clone() for sample_id, start, end in spans if sample_id != PADDING}


def _longest_first(lengths: Sequence[int]) -> list[int]:
    return sorted(range(len(lengths)), key=lambda i: -lengths[i])


def _best_fit(lengths: Sequence[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sample into the fullest bin that still holds it; `order` is longest first."""
    bins: list[list[int]] = []
    # (room, bin) of those that may take more, the fullest first; in shelves by room, as inserting into one list of all takes longer
    # the more there are.
    width = capacity // _SHELVES + 1
    shelves: list[list[tuple[int, int]]] = [[] for _ in range(_SHELVES + 1)]
    shortest = lengths[order[-1]] if order else 0
    for index in order:
        length = lengths[index]
        first = length // width
        shelf, place = shelves[first], bisect_left(shelves[first], (length, 0))
        if place == len(shelf):
            shelf, place = next((fuller for fuller in shelves[first + 1 :] if fuller), []), 0
        room, chosen = shelf.pop(place) if shelf else (capacity, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        if room - length >= shortest:
            insort(shelves[(room - length) // width], (room - length, chosen))
    return bins


def _has_field(samples: Sequence[TrainingSample], name: str) -> bool:
    present = {getattr(sample, name) is not None for sample in samples}
    if len(present) == 2:
        raise ValueError(f"some samples have {name} and some do not")
    return present.pop()


def _fill_row(samples: Sequence[TrainingSample], chosen: list[int], size: int, longest: int, fields: list[str]) -> MicroBatch:
    row = MicroBatch(
        token_ids=torch.zeros(1, size, dtype=torch.int64),
        labels=torch.zeros(1, size, dtype=torch.int64),
        loss_mask=torch.zeros(1, size),
        position_ids=torch.zeros(1, size, dtype=torch.int64),
        sample_ids=list(chosen),
        token_fields={name: torch.zeros(1, size) for name in ("advantages", *fields)},
    )
    # Losses divide by the trained tokens of a sequence: 1 if there are none, because 0/0 is NaN even under a zero mask.
    row.token_fields["sequence_lengths"] = torch.ones(1, size)
    ids, labels, mask = (tensor.numpy()[0] for tensor in (row.token_ids, row.labels, row.loss_mask))
    values = {name: row.token_fields[name].numpy()[0] for name in fields}
    bounds = [0]
    for index in chosen:
        sample = samples[index]
        start, end = bounds[-1], bounds[-1] + sample.num_targets
        ids[start:end], labels[start:end] = sample.token_ids[:-1], sample.token_ids[1:]
        mask[start:end][sample.trained] = 1
        row.position_ids[0, start:end] = torch.arange(sample.num_targets)
        row.token_fields["advantages"][0, start:end] = sample.advantage
        row.token_fields["sequence_lengths"][0, start:end] = max(sample.num_trained, 1)
        for name in fields:
            values[name][start:end] = getattr(sample, name)
        bounds.append(end)
    close_row(row, bounds, longest)
    return row


def close_row(row: MicroBatch, bounds: list[int], longest: int) -> None:
    """Fill the rest of a packed row with padding and set its boundaries.

    Attention in the thd layout needs every position inside a sequence, so padding makes sequences of its own, none longer than
    `longest`, the longest sample: padding must not raise the cost of attention.
    """
    size = row.token_ids.shape[1]
    while bounds[-1] < size:
        start, end = bounds[-1], min(bounds[-1] + longest, size)
        row.position_ids[0, start:end] = torch.arange(end - start)
        row.sample_ids.append(PADDING)
        bounds.append(end)
    row.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
