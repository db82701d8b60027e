"""The gradient of a loss by tokens, asked for some of them at a time."""

from __future__ import annotations

import torch

from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.loss_slope import LossSlope, is_asked

SHAPE = torch.Size((2, 5))  # b, s


def test_a_sum_over_tokens_is_known_token_by_token() -> None:
    generator = torch.Generator().manual_seed(0)
    outputs, weights = torch.rand((2, *SHAPE), generator=generator).unbind()

    def loss(output: torch.Tensor) -> torch.Tensor:
        return ((-output).exp() * weights).sum() * 30

    leaf = outputs.clone().requires_grad_()
    loss(leaf).backward()
    of_all = leaf.grad.t().flatten()  # tokens of [s, b]
    losses = outputs.t().flatten()
    slope = LossSlope(loss, SHAPE).at(None)
    with torch.no_grad():
        found = [slope(rows, losses[rows]) for rows in (slice(0, 3), slice(3, 9), slice(9, 10))]
    assert torch.equal(torch.cat(found), of_all)
    positions = torch.tensor([1, 4, 8])
    slope = LossSlope(loss, SHAPE).at(positions)
    found = [slope(rows, losses[positions[rows]]) for rows in (slice(0, 2), slice(2, 3))]
    assert torch.equal(torch.cat(found), of_all[positions])


def test_it_is_asked_for_on_a_cpu_with_whole_sequences() -> None:
    assert is_asked(torch.device("cpu"), Layout(tp=2, dp=2))
    assert not is_asked(torch.device("cpu"), Layout(cp=2)) and not is_asked(torch.device("cuda"), Layout())
