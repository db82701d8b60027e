"""The losses of reward models against hand values and their derivatives, and how their examples are packed."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.algorithms.losses.pairwise import pairwise_loss
from megatron_r1.algorithms.losses.safety import safety_loss
from megatron_r1.data.packing import PADDING
from megatron_r1.data.reward_packing import ScoredExample, last_token_values, pack_examples, unpack_last_values
from megatron_r1.errors import DataError
from megatron_r1.training.reward_model import reward_loss_of

NO_LABELS = torch.tensor([])


def test_pairwise_loss_by_hand() -> None:
    chosen = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([1.0, 1.0, 0.5], dtype=torch.float64, requires_grad=True)
    loss, metrics = pairwise_loss(torch.stack([chosen, rejected], dim=1).flatten(), NO_LABELS, denominator=3)
    margins = [1.0, -2.0, 0.0]
    assert loss.item() == pytest.approx(sum(math.log(1 + math.exp(-m)) for m in margins) / 3, abs=1e-12)
    assert metrics["accuracy"].value.item() == 1.5 and metrics["margin"].value.item() == -1.0
    loss.backward()
    # d/dm -log sigmoid(m) = -sigmoid(-m)
    want = torch.tensor([-1 / (1 + math.exp(m)) / 3 for m in margins], dtype=torch.float64)
    assert torch.allclose(chosen.grad, want) and torch.allclose(rejected.grad, -want)
    assert not metrics["margin"].value.requires_grad


def test_safety_loss_by_hand() -> None:
    scores = torch.tensor([3.0, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    safe = torch.tensor([1.0, 1.0, 0.0])
    loss, metrics = safety_loss(scores, safe, denominator=3)
    probabilities = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    want = -(math.log(probabilities[0]) + math.log(probabilities[1]) + math.log(1 - probabilities[2])) / 3
    assert loss.item() == pytest.approx(want, abs=1e-12) and metrics["accuracy"].value.item() == 1
    loss.backward()
    assert torch.allclose(scores.grad, (torch.tensor(probabilities, dtype=torch.float64) - safe) / 3)


def test_losses_stay_finite_at_the_ends() -> None:
    far = torch.tensor([1e4, -1e4])
    assert pairwise_loss(far.repeat_interleave(2) * torch.tensor([1, -1, 1, -1]), NO_LABELS, denominator=1)[
        0
    ].item() == pytest.approx(2e4)
    assert safety_loss(far, torch.tensor([0.0, 1.0]), denominator=1)[0].item() == pytest.approx(2e4)


PAIRS = [ScoredExample((list(range(1, 1 + a)), list(range(50, 50 + b)))) for a, b in ((5, 2), (3, 3), (9, 1), (2, 6))]


@pytest.mark.parametrize(("max_tokens", "dp_size"), [(10, 1), (100, 1), (12, 2), (10, 3)])
def test_pairs_stay_together_and_are_read_at_their_last_token(max_tokens: int, dp_size: int) -> None:
    sequences = [sequence for pair in PAIRS for sequence in pair.sequences]
    per_rank = pack_examples(PAIRS, max_tokens=max_tokens, dp_size=dp_size, pad_multiple=4)
    assert len({len(batches) for batches in per_rank}) == 1
    seen = {}
    for micro_batch in (batch for batches in per_rank for batch in batches):
        assert micro_batch.cu_seqlens[-1] == micro_batch.num_tokens <= -(-max_tokens // 4) * 4
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


@pytest.mark.parametrize("kind", ["helpful", "safety"])
def test_loss_over_micro_batches_is_that_of_the_whole_and_touches_last_tokens_only(kind: str) -> None:
    examples = PAIRS if kind == "helpful" else [ScoredExample((p.sequences[0],), safe=i % 2 == 0) for i, p in enumerate(PAIRS)]
    found = []
    for max_tokens in (10, 100):
        (batches,) = pack_examples(examples, max_tokens=max_tokens, dp_size=1, pad_multiple=2)
        scores = [(batch.token_ids.float() / 10).requires_grad_() for batch in batches]
        results = [reward_loss_of(kind, examples)(values, batch) for values, batch in zip(scores, batches, strict=True)]
        total = sum(loss for loss, _ in results)
        total.backward()
        for values, batch in zip(scores, batches, strict=True):
            assert torch.equal(values.grad != 0, batch.loss_mask > 0)
            assert last_token_values(batch, values).requires_grad
        found.append((total.item(), sum(metrics["accuracy"].value.item() for _, metrics in results)))
    assert found[0] == pytest.approx(found[1])
