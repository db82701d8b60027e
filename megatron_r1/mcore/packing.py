"""Where every token of a packed micro-batch is: positions, context-parallel shares, padded rows. Plain index arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

_MAX_PADDING = 4


def packed_positions(cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int = 1, cp_rank: int = 0) -> torch.Tensor:
    """Position of every local token inside its own sequence, [num_tokens] int64; 0 after the last sequence.

    Args:
        cu_seqlens: [S+1] global boundaries; under context parallelism every length is divisible by 2 * cp_size.
        num_tokens: tokens on this rank.
        cp_size: context-parallel ranks.
        cp_rank: this rank, which holds chunks r and 2 * cp_size - 1 - r of every sequence (the zigzag order).
    """
    bounds = cu_seqlens.long() // cp_size
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:], tokens, right=True)
    inside = sequence < len(bounds) - 1
    sequence = sequence.clamp(max=len(bounds) - 2)
    position = tokens - bounds[sequence]
    if cp_size > 1:
        chunk = (bounds[sequence + 1] - bounds[sequence]) // 2
        position += torch.where(position < chunk, cp_rank, 2 * cp_size - 2 - cp_rank) * chunk
    return torch.where(inside, position, 0)


def local_token_indices(cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> torch.Tensor:
    """Which tokens of the whole micro-batch rank `cp_rank` holds, in its order: [N / cp_size] int64.

    Rows without packing are one sequence: `cu_seqlens` [0, T].

    Raises:
        ValueError: a sequence length is not divisible by 2 * cp_size.
    """
    lengths = cu_seqlens.diff()
    if (lengths % (2 * cp_size)).any():
        raise ValueError(f"context parallelism over {cp_size} ranks needs sequence lengths divisible by {2 * cp_size}")
    num_local = int(cu_seqlens[-1]) // cp_size
    starts = torch.repeat_interleave(cu_seqlens[:-1].long(), lengths.long() // cp_size)
    return starts + packed_positions(cu_seqlens, num_local, cp_size, cp_rank)


def encode_sequences(cu_seqlens: torch.Tensor, is_real: list[bool], num_tokens: int, cp_size: int = 1) -> torch.Tensor:
    """The sequence of every local token, written in bits: [num_tokens, bits] bool. Sequences count from 1; 0 is padding.

    Args:
        cu_seqlens: [S+1] global boundaries.
        is_real: [S] whether a sequence is one, or padding.
        num_tokens: tokens on this rank.
        cp_size: context-parallel ranks; each holds its part of every sequence, in the same order.
    """
    device = cu_seqlens.device
    names = torch.tensor([number * real for number, real in enumerate(is_real, 1)] + [0], device=device)
    tokens = torch.arange(num_tokens, device=device)
    numbers = names[torch.searchsorted(cu_seqlens[1:].long() // cp_size, tokens, right=True)]
    return (numbers[:, None] >> torch.arange(len(is_real).bit_length(), device=device) & 1).bool()


def decode_sequences(bits: torch.Tensor) -> torch.Tensor:
    """What `encode_sequences` wrote into the last axis: [...] int64."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


@dataclass(frozen=True)
class RowGroup:
    """Sequences that share right-padded rows of one width."""

    tokens: torch.Tensor | None  #: [n] which tokens of the pack; None: all of them
    cells: torch.Tensor  #: [n] row * width + position of each of those tokens
    num_rows: int
    width: int


def group_rows(cu_seqlens: torch.Tensor) -> list[RowGroup]:
    """Lay packed sequences out as padded rows, so that one causal attention serves many of them.

    Sequences of very different length share rows only with their like (lengths between two powers of two), so that padding
    never costs more than `_MAX_PADDING` times the tokens.
    """
    lengths = cu_seqlens.diff().long()
    num_tokens, longest = int(cu_seqlens[-1]), int(lengths.max())
    positions = packed_positions(cu_seqlens, num_tokens)
    sequences = torch.repeat_interleave(lengths)
    if len(lengths) * longest <= _MAX_PADDING * num_tokens:
        return [RowGroup(None, sequences * longest + positions, len(lengths), longest)]
    groups = []
    size_classes = torch.log2(lengths.clamp(min=1).float()).ceil()
    for size_class in size_classes.unique():
        members = (size_classes == size_class).nonzero().flatten()
        rows = torch.full_like(lengths, -1)
        rows[members] = torch.arange(len(members), device=lengths.device)
        tokens = (rows[sequences] >= 0).nonzero().flatten()
        width = int(lengths[members].max())
        groups.append(RowGroup(tokens, rows[sequences[tokens]] * width + positions[tokens], len(members), width))
    return groups
