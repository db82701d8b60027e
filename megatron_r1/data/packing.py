"""Packs samples of different lengths end to end, so that no compute goes into padding.

R1 v2 (arXiv 2501.12948v2) supplement B.1: sort the global batch by length, distribute it over the data-parallel group, fill
fixed-length chunks by best fit, equalise the number of chunks.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence

import numpy as np
import torch

from megatron_r1.data.shared_prompts import bundle_samples, bundle_tokens, shared_tokens
from megatron_r1.errors import DataError
from megatron_r1.types import LOGPROBS, PADDING, PROMPT, MicroBatch, TrainingSample, round_up

_SHELVES = 256
_PARTS = 4  # at least so many bundles for each data-parallel rank, or one would have many more tokens than another


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
    samples: Sequence[TrainingSample],
    *,
    max_tokens: int,
    dp_size: int,
    pad_multiple: int,
    count_multiple: int = 1,
    sequence_multiple: int = 1,
    share_prompts: bool = False,
) -> list[MicroBatches]:
    """Every sample once, in micro-batches of one padded length N. Planned from lengths alone; reading a micro-batch fills it.

    Args:
        samples: the global batch, the same on every rank. Only the arrays of samples in micro-batches that are read are looked at.
            If they have a `home`, they go to that data-parallel rank.
        max_tokens: targets a micro-batch may hold.
        dp_size: data-parallel ranks.
        pad_multiple: N is a multiple of this (tensor parallel with sequence parallel needs a multiple of tp).
        count_multiple: the number of micro-batches is a multiple of this (an interleaved pipeline needs a multiple of pp).
        sequence_multiple: every sequence begins at a multiple of this, with padding behind the one before (context parallelism cuts
            each into 2 * cp equal parts); `pad_multiple` is one, too.
        share_prompts: samples of one group in a micro-batch share their prompt; and micro-batches get about as many tokens each.

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
    bundles, of_bundles = [[number] for number in range(len(samples))], homes or None
    max_tokens = round_up(max_tokens, sequence_multiple)
    if share_prompts:
        homes = homes or distribute_bundles(samples, max_tokens, dp_size, sequence_multiple)
        at_home: list[list[int]] = [[] for _ in range(dp_size)]
        for number, home in enumerate(homes):
            at_home[home].append(number)
        bundles = [bundle for numbers in at_home for bundle in bundle_samples(samples, numbers, max_tokens, sequence_multiple)]
        of_bundles = [homes[bundle[0]] for bundle in bundles]
    bins_per_rank, size = assign_bins(
        [bundle_tokens(samples, bundle, sequence_multiple) for bundle in bundles],
        of_bundles,
        max_tokens=max_tokens,
        dp_size=dp_size,
        pad_multiple=pad_multiple,
        count_multiple=count_multiple,
        level=share_prompts,
    )
    fields = [name for name in LOGPROBS if _has_field(samples, name)]
    longest = max(lengths)

    def fill(chosen: list[int]) -> MicroBatch:
        return _fill_row(samples, [bundles[number] for number in chosen], size, longest, fields, sequence_multiple)

    return [MicroBatches(bins, fill) for bins in bins_per_rank]


def assign_bins(
    lengths: Sequence[int],
    homes: Sequence[int] | None = None,
    *,
    max_tokens: int,
    dp_size: int,
    pad_multiple: int,
    count_multiple: int,
    level: bool = False,
) -> tuple[list[list[list[int]]], int]:
    """Which items share a micro-batch: equally many bins of item numbers for every data-parallel rank, and the bins' padded size.

    Args: see `pack_samples`; no length is above `max_tokens`.
        homes: the data-parallel rank of every item; None: those that `distribute` chooses.
        level: give the bins about as many tokens each, instead of filling one after the other: the padded size is the fullest's.
    """
    if homes is None:
        homes = distribute(lengths, dp_size)
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    for index in _longest_first(lengths):
        ranks[homes[index]].append(index)
    bins_per_rank = [_best_fit(lengths, chosen, max_tokens) for chosen in ranks]
    num_bins = round_up(max(len(bins) for bins in bins_per_rank), count_multiple)
    if level:
        bins_per_rank = [_level(lengths, bins, num_bins, max_tokens) for bins in bins_per_rank]
    fullest = max(sum(lengths[i] for i in chosen) for bins in bins_per_rank for chosen in bins)
    size = round_up(fullest, pad_multiple)
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


def distribute_bundles(samples: Sequence[TrainingSample], max_tokens: int, dp_size: int, multiple: int = 1) -> list[int]:
    """The data-parallel rank of every sample of a minibatch, where samples of a group share their prompt on one rank.

    Args: see `bundle_samples`.
    """
    numbers = range(len(samples))
    bundles = bundle_samples(samples, numbers, max_tokens, multiple)
    if dp_size > 1:
        total = sum(bundle_tokens(samples, bundle, multiple) for bundle in bundles)
        longest = max(sample.num_targets for sample in samples)
        part = round_up(max(longest, -(-total // (dp_size * _PARTS))), multiple)
        bundles = bundle_samples(samples, numbers, min(max_tokens, part), multiple)
    homes = [0] * len(samples)
    of_bundles = distribute([bundle_tokens(samples, bundle, multiple) for bundle in bundles], dp_size)
    for bundle, home in zip(bundles, of_bundles, strict=True):
        for number in bundle:
            homes[number] = home
    return homes


def unpack_token_values(micro_batch: MicroBatch, values_1N: torch.Tensor) -> dict[int, torch.Tensor]:
    """Per-token values of a packed micro-batch as {sample id: [T-1]}, aligned like the fields of `TrainingSample`."""
    starts = micro_batch.cu_seqlens[:-1].tolist()
    spans = [values_1N[0, start : start + n] for start, n in zip(starts, micro_batch.sequence_tokens().tolist(), strict=True)]
    found = {}
    for number, sample_id in enumerate(micro_batch.sample_ids):
        if sample_id >= 0:
            prompt = micro_batch.prompts[number] if micro_batch.prompts else number
            found[sample_id] = spans[number].clone() if prompt == number else torch.cat([spans[prompt], spans[number]])
    return found


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


def _level(lengths: Sequence[int], bins: list[list[int]], count: int, capacity: int) -> list[list[int]]:
    """The items of `bins` in `count` bins of about as many tokens, or `bins` if one would hold too many."""
    items = [item for chosen in bins for item in chosen]
    leveled: list[list[int]] = [[] for _ in range(count)]
    for item, number in zip(items, distribute([lengths[item] for item in items], count), strict=True):
        leveled[number].append(item)
    fits = all(sum(lengths[item] for item in chosen) <= capacity for chosen in leveled)
    return [chosen for chosen in leveled if chosen] if fits else bins


def _has_field(samples: Sequence[TrainingSample], name: str) -> bool:
    present = {getattr(sample, name) is not None for sample in samples}
    if len(present) == 2:
        raise ValueError(f"some samples have {name} and some do not")
    return present.pop()


def _fill_row(
    samples: Sequence[TrainingSample], bundles: list[list[int]], size: int, longest: int, fields: list[str], multiple: int
) -> MicroBatch:
    row = MicroBatch(
        token_ids=torch.zeros(1, size, dtype=torch.int64),
        labels=torch.zeros(1, size, dtype=torch.int64),
        loss_mask=torch.zeros(1, size),
        position_ids=torch.zeros(1, size, dtype=torch.int64),
        token_fields={name: torch.zeros(1, size) for name in ("advantages", *fields)},
    )
    # Losses divide by the trained tokens of a sequence: 1 if there are none, because 0/0 is NaN even under a zero mask.
    row.token_fields["sequence_lengths"] = torch.ones(1, size)
    # Written through numpy: a torch call for each field of each sample takes ten times as long.
    ids, labels, mask, positions = (t.numpy()[0] for t in (row.token_ids, row.labels, row.loss_mask, row.position_ids))
    values = {name: tensor.numpy()[0] for name, tensor in row.token_fields.items()}
    bounds = [0]

    def add(sample_id: int, sample: TrainingSample, first: int, last: int) -> slice:
        """The next sequence: the targets `first` to `last` of the sample."""
        place = slice(bounds[-1], bounds[-1] + last - first)
        ids[place], labels[place] = sample.token_ids[first:last], sample.token_ids[first + 1 : last + 1]
        positions[place] = np.arange(first, last)
        row.sample_ids.append(sample_id)
        row.lengths.append(last - first)
        bounds.append(round_up(place.stop, multiple))
        return place

    for bundle in bundles:
        shared = shared_tokens(samples[bundle[0]]) if len(bundle) > 1 else 0
        if shared:
            row.prompts = row.prompts or list(range(len(row.sample_ids)))
            prompt = len(row.sample_ids)
            add(PROMPT, samples[bundle[0]], 0, shared)
            row.prompts += [prompt] * (1 + len(bundle))
        elif row.prompts:
            row.prompts.append(len(row.sample_ids))
        for index in bundle:
            sample = samples[index]
            place = add(index, sample, shared, sample.num_targets)
            trained = np.zeros(sample.num_targets, np.float32)
            trained[sample.trained] = 1
            mask[place] = trained[shared:]
            values["advantages"][place] = sample.advantage
            values["sequence_lengths"][place] = max(sample.num_trained, 1)
            for name in fields:
                values[name][place] = getattr(sample, name)[shared:]
    close_row(row, bounds, round_up(longest, multiple))
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
        if row.prompts:
            row.prompts.append(len(row.sample_ids))
        row.sample_ids.append(PADDING)
        row.lengths.append(end - start)
        bounds.append(end)
    row.cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
