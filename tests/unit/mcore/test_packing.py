"""Index arithmetic of packed and context-parallel micro-batches."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.mcore.packing import (
    cut_rows,
    decode_sequences,
    encode_sequences,
    group_rows,
    local_token_indices,
    packed_positions,
)


def bounds(*lengths: int) -> torch.Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def test_positions_start_at_zero_in_every_sequence() -> None:
    assert packed_positions(bounds(3, 1, 2), 8).tolist() == [0, 1, 2, 0, 0, 1, 0, 0]


def test_positions_skip_empty_sequences() -> None:
    assert packed_positions(bounds(2, 0, 2), 4).tolist() == [0, 1, 0, 1]


def test_context_parallel_ranks_hold_mirrored_chunks() -> None:
    cu_seqlens = bounds(8, 4)
    assert local_token_indices(cu_seqlens, 2, 0).tolist() == [0, 1, 6, 7, 8, 11]
    assert local_token_indices(cu_seqlens, 2, 1).tolist() == [2, 3, 4, 5, 9, 10]
    assert packed_positions(cu_seqlens, 6, 2, 0).tolist() == [0, 1, 6, 7, 0, 3]


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_context_parallel_ranks_cover_every_token_once(cp_size: int) -> None:
    cu_seqlens = bounds(12, 24, 36)
    everything = torch.cat([local_token_indices(cu_seqlens, cp_size, rank) for rank in range(cp_size)])
    assert everything.sort().values.tolist() == list(range(72))


def test_context_parallelism_needs_divisible_sequences() -> None:
    with pytest.raises(ValueError, match="over 2 ranks needs sequence lengths divisible by 4"):
        local_token_indices(bounds(8, 6), 2, 0)


@pytest.mark.parametrize("cp_size", [2, 3])
def test_the_rows_of_a_rank_have_its_queries_and_all_keys_before_them(cp_size: int) -> None:
    cu_seqlens, size = bounds(*(2 * cp_size * n for n in (1, 64, 3, 2, 2))), 2 * cp_size * 72
    groups = group_rows(cu_seqlens)
    assert len(groups) > 1, "rows of several widths"
    for rank in range(cp_size):
        held = local_token_indices(cu_seqlens, cp_size, rank)
        sees = torch.zeros(len(held), size, dtype=torch.bool)
        for group in cut_rows(groups, cu_seqlens, cp_size, rank):
            assert group.mask.any(-1).all(), "no row of a softmax is empty"
            keys = torch.arange(size) if group.keys.tokens is None else group.keys.tokens
            mask = group.mask[:, 0].flatten(0, 1)[group.queries.cells]
            for query, row, seen in zip(group.queries.tokens, group.queries.cells // group.queries.width, mask, strict=True):
                of_row = group.keys.cells // group.keys.width == row
                sees[query, keys[of_row][seen[group.keys.cells[of_row] % group.keys.width]]] = True
        starts = held - packed_positions(cu_seqlens, len(held), cp_size, rank)
        everything = torch.arange(size)
        assert torch.equal(sees, (everything <= held[:, None]) & (everything >= starts[:, None]))


def test_padding_behind_a_sequence_is_of_none() -> None:
    """Rank 0 of two has places 0, 1, 6, 7 of the first sequence, whose last token is at place 6, and 0, 3 of the second."""
    bits = encode_sequences(bounds(8, 4, 4), [True, True, False], 8, 2, 0, torch.tensor([7, 3, 4]))
    assert decode_sequences(bits).tolist() == [1, 1, 1, 0, 2, 0, 0, 0]


@pytest.mark.parametrize("lengths", [[3, 1, 2], [64, 1, 1, 1, 2, 3, 1, 1], [5], [7, 0, 2]])
def test_padded_rows_hold_every_token_once(lengths: list[int]) -> None:
    seen = torch.zeros(sum(lengths))
    for group in group_rows(bounds(*lengths)):
        tokens = torch.arange(sum(lengths)) if group.tokens is None else group.tokens
        seen[tokens] += 1
        assert group.cells.unique().numel() == group.cells.numel()
        assert int(group.cells.max()) < group.num_rows * group.width
        assert (group.cells % group.width).tolist() == packed_positions(bounds(*lengths), sum(lengths))[tokens].tolist()
    assert seen.tolist() == [1] * sum(lengths)


def test_padding_is_bounded_when_lengths_differ() -> None:
    lengths = [1024] + [3] * 200
    groups = group_rows(bounds(*lengths))
    assert len(groups) == 2
    assert sum(group.num_rows * group.width for group in groups) <= 2 * sum(lengths)
