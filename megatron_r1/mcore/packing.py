"""Where every token of a packed micro-batch is: positions, context-parallel shares, padded rows. Plain index arithmetic."""

from __future__ import annotations

import torch


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


class PaddedRows:
    """Packed sequences as right-padded rows and back, so that one causal attention serves many sequences.

    Sequences of very different length share rows only with their like (lengths between powers of two), so that padding
    never costs more than `_MAX_PADDING` times the tokens.
    """

    _MAX_PADDING = 4

    def __init__(self, cu_seqlens: torch.Tensor) -> None:
        lengths = cu_seqlens.diff().long()
        longest = int(lengths.max())
        self.num_tokens = int(cu_seqlens[-1])
        self.groups: list[tuple[torch.Tensor, torch.Tensor, int, int]] = []  #: tokens, their cells, rows, row length
        position = packed_positions(cu_seqlens, self.num_tokens)
        sequence = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        if len(lengths) * longest <= self._MAX_PADDING * self.num_tokens:
            self._add_group(None, sequence, position, len(lengths), longest)
            return
        size_class = torch.log2(lengths.clamp(min=1).float()).ceil().long()
        for wanted in size_class.unique():
            members = (size_class == wanted).nonzero().flatten()
            row = torch.full((len(lengths),), -1, device=lengths.device)
            row[members] = torch.arange(len(members), device=lengths.device)
            tokens = (row[sequence] >= 0).nonzero().flatten()
            self._add_group(tokens, row[sequence[tokens]], position[tokens], len(members), int(lengths[members].max()))

    def _add_group(self, tokens: torch.Tensor | None, row: torch.Tensor, position: torch.Tensor, rows: int, width: int) -> None:
        tokens = torch.arange(self.num_tokens, device=row.device) if tokens is None else tokens
        self.groups.append((tokens, row * width + position, rows, width))
