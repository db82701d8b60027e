"""The supervised loss: pretraining and fine-tuning."""

from __future__ import annotations

import torch


def cross_entropy_loss(logprobs: torch.Tensor, *, loss_mask: torch.Tensor, denominator: float) -> torch.Tensor:
    """Mean negative log-likelihood of the masked targets, in nats (scalar).

    Args:
        logprobs: [...] log pi_theta of the target tokens, with gradient.
        loss_mask: [...] 1 on trained targets, or their weights, of either sign.
        denominator: number of trained targets in the whole batch, so that parts of it add up.
    """
    # An infinite log-prob of a target without loss, times a zero mask, would be a NaN.
    return -torch.where(loss_mask != 0, logprobs * loss_mask, 0.0).sum() / denominator
