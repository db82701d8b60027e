"""Which of torch's ways to make a step of AdamW is taken on a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_r1.mcore import host
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.model.size import count_parameters

host.activate("cpu")

from megatron_r1.mcore.build_optimizer import FUSED_FROM, choose_adam

SHAPES = [(64, 33), (7, 13, 5), (129,), (1,), (256, 64)]


def step(arch_overrides: dict | None, kind: type[torch.optim.Optimizer] = torch.optim.AdamW) -> torch.optim.Optimizer:
    """Three steps of an optimizer that was chosen for a model of that shape; None: as torch makes them by itself."""
    random = torch.Generator().manual_seed(0)
    parameters = [torch.randn(shape, generator=random).requires_grad_() for shape in SHAPES]
    groups = [{"params": parameters[:3], "weight_decay": 0.1}, {"params": parameters[3:], "weight_decay": 0.0}]
    optimizer = kind(groups, lr=1e-2)
    if arch_overrides is not None:
        parts = [SimpleNamespace(is_stub_optimizer=True), SimpleNamespace(is_stub_optimizer=False, optimizer=optimizer)]
        choose_adam(SimpleNamespace(chained_optimizers=parts), resolve_architecture("tiny", arch_overrides))
    for _ in range(3):
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=random)
        optimizer.step()
    return optimizer


def numbers(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    found = [(p.detach(), *optimizer.state[p].values()) for group in optimizer.param_groups for p in group["params"]]
    return [tensor for tensors in found for tensor in tensors]


def test_small_models_keep_every_bit():
    chosen, plain = step({}), step(None)
    assert count_parameters(resolve_architecture("tiny")) < FUSED_FROM
    assert all(group["foreach"] and not group["fused"] for group in chosen.param_groups)
    assert all(map(torch.equal, numbers(chosen), numbers(plain)))


def test_large_models_take_one_pass():
    chosen, plain = step({"num_hidden_layers": 30}), step(None)
    assert all(group["fused"] and not group["foreach"] for group in chosen.param_groups)
    for one, other in zip(numbers(chosen), numbers(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_other_optimizers_stay_as_they_are(kind):
    assert all(not group["fused"] and not group["foreach"] for group in step({}, kind).param_groups)
