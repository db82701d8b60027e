"""The safety loss against hand values and its derivative."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_r1.algorithms.losses.safety import safety_loss


def test_safety_loss_by_hand() -> None:
    scores = torch.tensor([3.0, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    safe = torch.tensor([1.0, 1.0, 0.0])
    loss, metrics = safety_loss(scores, safe, denominator=3)
    probabilities = [1 / (1 + math.exp(-s)) for s in scores.tolist()]
    want = -(math.log(probabilities[0]) + math.log(probabilities[1]) + math.log(1 - probabilities[2])) / 3
    assert loss.item() == pytest.approx(want, abs=1e-12) and metrics["accuracy"].value.item() == 1
    loss.backward()
    assert torch.allclose(scores.grad, (torch.tensor(probabilities, dtype=torch.float64) - safe) / 3)


def test_the_loss_stays_finite_at_the_ends() -> None:
    loss, _ = safety_loss(torch.tensor([1e4, -1e4]), torch.tensor([0.0, 1.0]), denominator=1)
    assert loss.item() == pytest.approx(2e4)
