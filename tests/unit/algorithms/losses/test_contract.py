"""What a policy loss may ask of its batch."""

from __future__ import annotations

import torch

from megatron_r1.algorithms.losses.contract import PolicyBatch


def test_sums_over_sequences_leave_out_prompts_and_pass_the_gradient_on() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0, 8.0, float("inf"), 16.0]], requires_grad=True)
    zeros = torch.zeros(1, 6)
    batch = PolicyBatch(
        logprobs=values,
        old_logprobs=zeros,
        rollout_logprobs=zeros,
        ref_logprobs=None,
        advantages=zeros,
        loss_mask=torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0, 0.0]]),
        sequence_ids=torch.tensor([[0, 0, 0, 1, 1, 2]]),
        sequence_lengths=torch.ones(1, 6),
        num_sequences=3,
        minibatch_sequences=3,
        minibatch_tokens=3,
    )
    sums = batch.sum_sequences(values)
    assert sums.tolist() == [6.0, 8.0, 0.0]
    weights = torch.tensor([1.0, 10.0, 100.0])
    assert batch.at_tokens(weights).tolist() == [[1.0, 1.0, 1.0, 10.0, 10.0, 100.0]]
    (sums * weights).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [[0.0, 1.0, 1.0, 10.0, 0.0, 0.0]]
