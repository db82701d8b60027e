"""The pairwise loss against hand values and its derivative."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.algorithms.losses.pairwise import pairwise_loss

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


def test_the_loss_stays_finite_at_the_ends() -> None:
    far = torch.tensor([1e4, -1e4, -1e4, 1e4])
    assert pairwise_loss(far, NO_LABELS, denominator=1)[0].item() == pytest.approx(2e4)
