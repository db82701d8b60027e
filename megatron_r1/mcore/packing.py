"""Where every token of a packed micro-batch is: positions, context-parallel shares, padded rows. Plain index arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_r1.types import filled

_MAX_PADDING = 4
_MOST_CELLS = 1 << 24  # of the mask of several rows


def packed_positions(cu_seqlens: torch.Tensor, num_tokens: int, cp_size: int = 1, cp_rank: int = 0) -> torch.Tensor:
    """Position of every local token inside its own sequence, [num_tokens] int64; 0 after the last sequence.

    Args:
        cu_seqlens: [S+1] global boundaries; under context parallelism every length is divisible by 2 * cp_size. Or [2, S+1]: these,
            and the position at which every sequence begins, behind a prompt that it shares; of the last entry, 0.
        num_tokens: tokens on this rank.
        cp_size: context-parallel ranks.
        cp_rank: this rank, which holds chunks r and 2 * cp_size - 1 - r of every sequence (the zigzag order).
    """
    first = cu_seqlens[1] if cu_seqlens.dim() == 2 else None
    bounds = (cu_seqlens if first is None else cu_seqlens[0]).long() // cp_size
    tokens = torch.arange(num_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:], tokens, right=True)
    inside = sequence < len(bounds) - 1
    sequence = sequence.clamp(max=len(bounds) - 2)
    position = tokens - bounds[sequence]
    if cp_size > 1:
        chunk = (bounds[sequence + 1] - bounds[sequence]) // 2
        position += torch.where(position < chunk, cp_rank, 2 * cp_size - 2 - cp_rank) * chunk
    if first is not None:
        position += first[sequence]
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


def encode_sequences(
    cu_seqlens: torch.Tensor, is_real: list[bool], num_tokens: int, cp_size: int = 1, cp_rank: int = 0,
    lengths: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The sequence of every local token, written in bits: [num_tokens, bits] bool. Sequences count from 1; 0 is padding.

    Args:
        cu_seqlens: [S+1] global boundaries.
        is_real: [S] whether a sequence is one, or padding.
        num_tokens: tokens on this rank.
        cp_size: context-parallel ranks; each holds its part of every sequence, in the same order.
        cp_rank: this rank.
        lengths: [S] tokens of each sequence; what is behind them is padding. None: nothing is.
    """
    device = cu_seqlens.device
    names = torch.tensor([number * real for number, real in enumerate(is_real, 1)] + [0], device=device)
    tokens = torch.arange(num_tokens, device=device)
    sequence = torch.searchsorted(cu_seqlens[1:].long() // cp_size, tokens, right=True)
    numbers = names[sequence]
    if lengths is not None:
        ends = torch.nn.functional.pad(lengths, (0, 1))
        numbers = numbers * (packed_positions(cu_seqlens, num_tokens, cp_size, cp_rank) < ends[sequence])
    return (numbers[:, None] >> torch.arange(len(is_real).bit_length(), device=device) & 1).bool()


def decode_sequences(bits: torch.Tensor) -> torch.Tensor:
    """What `encode_sequences` wrote into the last axis: [...] int64."""
    return (bits.long() << torch.arange(bits.shape[-1], device=bits.device)).sum(-1)


@dataclass(frozen=True)
class RowGroup:
    """Sequences that share right-padded rows of one width."""

    tokens: torch.Tensor | None  #: [n] which tokens of the pack; None: all of them. Those of a shared prompt stand in several rows
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


@dataclass(frozen=True)
class MaskedRows:
    """Rows whose keys are others than their queries: of sequences that go on from shared prompts, those of the prompt, too."""

    queries: RowGroup
    keys: RowGroup
    mask: torch.Tensor  #: [rows, 1, width of queries, width of keys] bool: what a query sees


def cut_rows(groups: Sequence[RowGroup | MaskedRows], cu_seqlens: torch.Tensor, cp_size: int, cp_rank: int) -> list[MaskedRows]:
    """The rows of one context-parallel rank: its own queries, and all keys.

    Args:
        groups: rows of the whole micro-batch, each token as a query of one of them.
        cu_seqlens: [S+1] boundaries; every length is divisible by 2 * cp_size.
        cp_size: context-parallel ranks.
        cp_rank: this rank.
    """
    held = local_token_indices(cu_seqlens, cp_size, cp_rank)
    tokens = torch.arange(len(held), device=held.device)
    bounds = cu_seqlens.long() // cp_size
    places = tokens - bounds[torch.searchsorted(bounds[1:], tokens, right=True)]  # among this rank's tokens of the sequence
    cut = []
    for group in groups:
        whole = group if isinstance(group, RowGroup) else group.queries
        cells = held.new_full((int(cu_seqlens[-1]),), -1)
        cells[slice(None) if whole.tokens is None else whole.tokens] = whole.cells
        own = (cells[held] >= 0).nonzero().flatten()
        rows, positions = cells[held[own]] // whole.width, cells[held[own]] % whole.width
        width = whole.width // cp_size
        queries = RowGroup(own, rows * width + places[own], whole.num_rows, width)
        # Cells without a query see what a first token sees: a row of a softmax must not be empty.
        seen = held.new_zeros(whole.num_rows * width).index_copy(0, queries.cells, positions).view(whole.num_rows, width, 1)
        if isinstance(group, RowGroup):
            cut.append(MaskedRows(queries, group, (torch.arange(whole.width, device=held.device) <= seen)[:, None]))
        else:
            mask = group.mask[:, 0].gather(1, seen.expand(-1, -1, group.keys.width))
            cut.append(MaskedRows(queries, group.keys, mask[:, None]))
    return cut


def share_rows(cu_seqlens: torch.Tensor, prompts: list[int], tokens: torch.Tensor | None = None) -> list[RowGroup | MaskedRows]:
    """As `group_rows`, where sequences go on from others.

    Args:
        cu_seqlens: [S+1] boundaries.
        prompts: [S] which sequence each goes on from; itself: none.
        tokens: [S] of each sequence, without padding behind it; None: nothing is behind any.
    """
    lengths, starts = cu_seqlens.diff().long(), cu_seqlens[:-1].long()
    of, tokens = torch.tensor(prompts, device=lengths.device), lengths if tokens is None else tokens
    alone = of == torch.arange(len(lengths), device=lengths.device)
    first = alone.nonzero().flatten()
    bounds = torch.cat([lengths.new_zeros(1), lengths[first].cumsum(0)])
    where = _tokens_of(first, lengths, starts)
    groups: list[RowGroup | MaskedRows] = [
        RowGroup(where if group.tokens is None else where[group.tokens], group.cells, group.num_rows, group.width)
        for group in group_rows(bounds)
    ]
    # Longest first, and as many rows at a time as a mask of bounded size allows.
    rest = sorted((~alone).nonzero().flatten().tolist(), key=lambda number: -int(lengths[number]))
    while rest:
        members, before = [rest.pop(0)], 0
        width = int(lengths[members[0]])
        before = int(lengths[of[members[0]]])
        while rest and width <= 2 * int(lengths[rest[0]]):
            wider = max(before, int(lengths[of[rest[0]]]))
            if (len(members) + 1) * width * (wider + width) > _MOST_CELLS:
                break
            before = wider
            members.append(rest.pop(0))
        groups.append(_shared_rows(torch.tensor(members, device=lengths.device), of, lengths, starts, tokens))
    return groups


def _shared_rows(
    members: torch.Tensor, of: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor, tokens: torch.Tensor
) -> MaskedRows:
    own, prompt = (_row_group(numbers, lengths, starts) for numbers in (members, of[members]))
    queries = torch.arange(own.width, device=lengths.device)
    places = torch.arange(prompt.width + own.width, device=lengths.device)
    in_prompt = places < tokens[of[members]][:, None]
    before = (places >= prompt.width) & (places - prompt.width <= queries[:, None])
    width = prompt.width + own.width
    cells = [group.cells // group.width * width + group.cells % group.width for group in (prompt, own)]
    seen = torch.cat([filled(prompt.tokens), filled(own.tokens)])
    keys = RowGroup(seen, torch.cat([cells[0], cells[1] + prompt.width]), own.num_rows, width)
    return MaskedRows(own, keys, (in_prompt[:, None] | before)[:, None])


def _row_group(numbers: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> RowGroup:
    """The sequences of these numbers, each in a row; a number may come more than once."""
    width = int(lengths[numbers].max())
    tokens = _tokens_of(numbers, lengths, starts)
    rows = torch.repeat_interleave(lengths[numbers])
    return RowGroup(tokens, rows * width + tokens - starts[numbers][rows], len(numbers), width)


def _tokens_of(numbers: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """The tokens of the sequences of these numbers, one sequence after the other."""
    chosen = lengths[numbers]
    ends = chosen.cumsum(0)
    return torch.arange(int(ends[-1]), device=lengths.device) + torch.repeat_interleave(starts[numbers] - ends + chosen, chosen)
