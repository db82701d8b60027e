"""The loss of a reward model over its micro-batches."""

from __future__ import annotations

import pytest
import torch

from megatron_r1.data.reward_packing import ScoredExample, last_token_values, pack_examples
from megatron_r1.training.reward_model import reward_loss_of

PAIRS = [ScoredExample((list(range(1, 1 + a)), list(range(50, 50 + b)))) for a, b in ((5, 2), (3, 3), (9, 1), (2, 6))]


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
