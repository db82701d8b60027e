"""Packs samples of different lengths end to end, so that no compute goes into padding.

R1 v2 (arXiv 2501.12948v2) supplement B.1: sort the global batch by length, distribute it over the data-parallel group, fill
fixed-length chunks by best fit, equalise the number of chunks.
"""

from __future__ import annotations

import torch

from megatron_r1.errors import DataError
from megatron_r1.types import PADDING, MicroBatch, TrainingSample

_LOGPROB_FIELDS = ("rollout_logprobs", "old_logprobs", "ref_logprobs")


def pack_samples(
    samples: list[TrainingSample], *, max_tokens: int, dp_size: int, pad_multiple: int, count_multiple: int = 1
) -> list[list[MicroBatch]]:
    """Every sample once, in micro-batches of one padded length N.

    Args:
        samples: the global batch, the same on every rank.
        max_tokens: targets a micro-batch may hold.
        dp_size: data-parallel ranks.
        pad_multiple: N is a multiple of this (tensor parallel with sequence parallel needs a multiple of tp).
        count_multiple: the number of micro-batches is a multiple of this (an interleaved pipeline needs a multiple of pp).

    Returns:
        One list of micro-batches per data-parallel rank, all of the same length; a rank with fewer gets micro-batches that
        are all padding. N is the fullest micro-batch rounded up to `pad_multiple`, so at most `max_tokens` rounded up.

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
    bins_per_rank, size = assign_bins(
        lengths, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=pad_multiple, count_multiple=count_multiple
    )
    fields = [name for name in _LOGPROB_FIELDS if _has_field(samples, name)]
    longest = max(lengths)
    return [[_fill_row(samples, chosen, size, longest, fields) for chosen in bins] for bins in bins_per_rank]


def assign_bins(
    lengths: list[int], *, max_tokens: int, dp_size: int, pad_multiple: int, count_multiple: int
) -> tuple[list[list[list[int]]], int]:
    """Which items share a micro-batch: equally many bins of item numbers for every data-parallel rank, and the bins' padded size.

    Args: see `pack_samples`; no length is above `max_tokens`.
    """
    bins_per_rank = [_best_fit(lengths, chosen, max_tokens) for chosen in _distribute(lengths, dp_size)]
    num_bins = -(-max(len(bins) for bins in bins_per_rank) // count_multiple) * count_multiple
    fullest = max(sum(lengths[i] for i in chosen) for bins in bins_per_rank for chosen in bins)
    size = -(-fullest // pad_multiple) * pad_multiple
    return [bins + [[] for _ in range(num_bins - len(bins))] for bins in bins_per_rank], size


def unpack_token_values(micro_batch: MicroBatch, values_1N: torch.Tensor) -> dict[int, torch.Tensor]:
    """Per-token values of a packed micro-batch as {sample id: [T-1]}, aligned like the fields of `TrainingSample`."""
    bounds = micro_batch.cu_seqlens.tolist()
    spans = zip(micro_batch.sample_ids, bounds[:-1], bounds[1:], strict=True)
    return {sample_id: values_1N[0, start:end].clone() for sample_id, start, end in spans if sample_id != PADDING}


def _distribute(lengths: list[int], dp_size: int) -> list[list[int]]:
    """Longest first, each to the rank with the fewest tokens so far (then the fewest samples, then the lowest rank)."""
    ranks: list[list[int]] = [[] for _ in range(dp_size)]
    loads = [0] * dp_size
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        rank = min(range(dp_size), key=lambda r: (loads[r], len(ranks[r])))
        ranks[rank].append(index)
        loads[rank] += lengths[index]
    return ranks


def _best_fit(lengths: list[int], order: list[int], capacity: int) -> list[list[int]]:
    """Each sample into the fullest bin that still holds it; `order` is longest first."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in order:
        fitting = [b for b in range(len(bins)) if room[b] >= lengths[index]]
        if fitting:
            chosen = min(fitting, key=room.__getitem__)
        else:
            chosen = len(bins)
            bins.append([])
            room.append(capacity)
        bins[chosen].append(index)
        room[chosen] -= lengths[index]
    return bins


def _has_field(samples: list[TrainingSample], name: str) -> bool:
    present = {getattr(sample, name) is not None for sample in samples}
    if len(present) == 2:
        raise ValueError(f"some samples have {name} and some do not")
    return present.pop()


def _fill_row(samples: list[TrainingSample], chosen: list[int], size: int, longest: int, fields: list[str]) -> MicroBatch:
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
    bounds = [0]
    for index in chosen:
        sample = samples[index]
        start, end = bounds[-1], bounds[-1] + sample.num_targets
        ids = torch.tensor(sample.token_ids)
        row.token_ids[0, start:end], row.labels[0, start:end] = ids[:-1], ids[1:]
        row.loss_mask[0, start:end] = torch.tensor(sample.loss_mask, dtype=torch.float32)
        row.position_ids[0, start:end] = torch.arange(sample.num_targets)
        row.token_fields["advantages"][0, start:end] = sample.advantage
        row.token_fields["sequence_lengths"][0, start:end] = max(sample.num_trained, 1)
        for name in fields:
            row.token_fields[name][0, start:end] = getattr(sample, name)
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
