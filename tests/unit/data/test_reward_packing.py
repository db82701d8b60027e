"""How examples of a reward model are packed, and where their scores are read."""

from __future__ import annotations

import pytest

from megatron_r1.data.reward_packing import ScoredExample, pack_examples, unpack_last_values
from megatron_r1.errors import DataError
from megatron_r1.types import PADDING

PAIRS = [ScoredExample((list(range(1, 1 + a)), list(range(50, 50 + b)))) for a, b in ((5, 2), (3, 3), (9, 1), (2, 6))]


@pytest.mark.parametrize(("max_tokens", "dp_size", "multiple"), [(10, 1, 1), (100, 1, 1), (12, 2, 1), (10, 3, 1), (10, 1, 4)])
def test_pairs_stay_together_and_are_read_at_their_last_token(max_tokens: int, dp_size: int, multiple: int) -> None:
    sequences = [sequence for pair in PAIRS for sequence in pair.sequences]
    per_rank = pack_examples(PAIRS, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=4, sequence_multiple=multiple)
    assert len({len(batches) for batches in per_rank}) == 1
    seen = {}
    for micro_batch in (batch for batches in per_rank for batch in batches):
        assert micro_batch.cu_seqlens[-1] == micro_batch.num_tokens <= -(-max_tokens // 4) * 4 + multiple * (multiple > 1)
        assert not (micro_batch.cu_seqlens % multiple).any()
        numbers = [number for number in micro_batch.sample_ids if number != PADDING]
        assert numbers[0::2] == [n for n in numbers if n % 2 == 0] and numbers[1::2] == [n + 1 for n in numbers[0::2]]
        assert micro_batch.loss_mask.sum() == len(numbers)
        seen |= unpack_last_values(micro_batch, micro_batch.token_ids.float())
        for number, start in zip(micro_batch.sample_ids, micro_batch.cu_seqlens.tolist(), strict=False):
            if number != PADDING:
                held = micro_batch.token_ids[0, start : start + len(sequences[number])]
                assert held.tolist() == sequences[number]
    assert {number: int(value) for number, value in seen.items()} == {n: sequence[-1] for n, sequence in enumerate(sequences)}


def test_an_example_that_does_not_fit_is_named() -> None:
    with pytest.raises(DataError, match="example 2 has 10 tokens.*micro_batch_tokens=9"):
        pack_examples(PAIRS, max_tokens=9, dp_size=1, pad_multiple=1)
