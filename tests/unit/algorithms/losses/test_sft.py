"""The supervised loss: a mean over the trained targets of the whole batch, whatever the part."""

from __future__ import annotations

import math

import torch

from megatron_r1.algorithms.losses.sft import cross_entropy_loss


def test_parts_add_up_to_the_mean_of_the_trained_targets() -> None:
    logprobs = torch.tensor([-1.0, -2.0, -4.0, -8.0], requires_grad=True)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    parts = [cross_entropy_loss(logprobs[i : i + 2], loss_mask=mask[i : i + 2], denominator=3) for i in (0, 2)]
    loss = parts[0] + parts[1]
    loss.backward()
    assert loss.item() == torch.tensor(13 / 3).item()
    assert logprobs.grad is not None and torch.allclose(logprobs.grad, -mask / 3)


def test_an_infinite_logprob_without_loss_does_not_matter() -> None:
    logprobs = torch.tensor([-1.0, -math.inf, math.nan], requires_grad=True)
    loss = cross_entropy_loss(logprobs, loss_mask=torch.tensor([1.0, 0.0, 0.0]), denominator=1)
    loss.backward()
    assert loss.item() == 1.0 and logprobs.grad is not None and logprobs.grad.tolist() == [-1.0, 0.0, 0.0]
