"""RMSNorm and SwiGLU are torch's, and go through memory less often."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from megatron_r1.mcore.elementwise import rms_norm, swiglu

DTYPES = [torch.float32, torch.bfloat16]


def outcome(work: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> list[torch.Tensor]:
    """The result of a function, and the gradient of each input."""
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    result = work(*leaves)
    upstream = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, upstream)]


def by_torch(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, weight.shape, weight, 1e-5)


@pytest.mark.parametrize("shape", [(7, 3, 64), (5, 2, 4, 32), (9, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_has_torchs_bits_and_gradient(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), (1 + torch.randn(shape[-1]) / 4).to(dtype)
    ours, theirs = outcome(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight), outcome(by_torch, x, weight)
    assert torch.equal(ours[0], theirs[0])
    exact = outcome(by_torch, x.double(), weight.double())
    for one, other, true in zip(ours[1:], theirs[1:], exact[1:], strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one - true).norm() <= 1.5 * (other - true).norm() + 1e-7 * true.norm(), "as near to the true one as torch's"


def test_rms_norm_of_other_strides() -> None:
    x, weight = torch.randn(6, 4, 32), torch.randn(32)
    moved = outcome(lambda x, weight: rms_norm(x.transpose(0, 1), weight, 1e-5).transpose(0, 1), x, weight)
    for one, other in zip(moved, outcome(lambda x, weight: rms_norm(x, weight, 1e-5), x, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_what_overflows_breaks_the_gradient_and_is_not_taken_for_zero() -> None:
    ours, theirs = (
        outcome(norm, torch.full((1, 4), 3e38), torch.ones(4)) for norm in (lambda x, weight: rms_norm(x, weight, 1e-5), by_torch)
    )
    assert torch.equal(ours[0], theirs[0]) and theirs[1].isnan().all() and ours[1].isnan().all()


@pytest.mark.parametrize("shape", [(5, 3, 48), (7, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_swiglu_is_autograds_to_the_bit(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    def plain(x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        return F.silu(gate) * up

    x = torch.randn(shape).to(dtype)
    assert all(map(torch.equal, outcome(swiglu, x), outcome(plain, x)))


def test_nothing_is_left_for_a_second_derivative() -> None:
    x = torch.randn(3, 8, requires_grad=True)
    (first,) = torch.autograd.grad(swiglu(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="marked with @once_differentiable"):
        first.sum().backward()
