"""Which of torch's ways to make a step of AdamW is taken on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore.build_optimizer import choose_adam

SHAPES = [(64, 33), (7, 13, 5), (129,), (1,), (256, 64)]


def step(is_chosen: bool, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    """Three steps of an optimizer, as it is chosen or as torch makes them by itself."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=random).requires_grad_() for shape in SHAPES]
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2)
    if is_chosen:
        parts = [SimpleNamespace(is_stub_optimizer=True), SimpleNamespace(is_stub_optimizer=False, optimizer=optimizer)]
        choose_adam(SimpleNamespace(chained_optimizers=parts))
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
    return optimizer


def numbers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [(p.detach(), *optimizer.state[p].values()) for group in optimizer.param_groups for p in group["params"]]
    return [tensor for tensors in found for tensor in tensors]


def test_a_step_is_one_pass():
    chosen, plain = step(True), step(False)
    assert all(group["fused"] and not group["foreach"] for group in chosen.param_groups)
    for one, other in zip(numbers(chosen), numbers(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_stay_as_they_are(kind):
    assert all(not group["fused"] and not group["foreach"] for group in step(True, kind).param_groups)
