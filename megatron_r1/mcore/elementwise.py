"""RMSNorm and SwiGLU on a CPU, forward and backward, in about half of the passes over memory that autograd takes. Pure: no
Megatron-Core."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, as `torch.nn.functional.rms_norm`, to the bit.

    The gradient is that of the same formula, rounded otherwise.

    Args:
        x: [..., n].
        weight: [n].
        eps: in float32, in which all is computed.
    """
    return _RmsNorm.apply(x, weight, eps)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return (wide * factor).mul_(weight).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None]:
        x, weight, factor = ctx.saved_tensors
        width = x.shape[-1]
        rows, upstream, gain = x.reshape(-1, width).float(), gradient.reshape(-1, width).float(), weight.float()
        factor = factor.view(-1, 1)
        products = upstream * rows
        of_weight = torch.mv(products.t(), factor.squeeze(1)).to(weight.dtype)
        # d factor / d x is -factor^3 x / n, of which 2 x is the square's: as large as that, it overflows where autograd's does.
        of_square = torch.mv(products, gain).unsqueeze(1).mul_(factor**3).mul_(-0.5 / width)
        of_x = (upstream * gain).mul_(factor).addcmul_(rows, of_square, value=2)
        return of_x.to(x.dtype).view_as(x), of_weight, None


def swiglu(x: torch.Tensor) -> torch.Tensor:
    """silu(first half) * second half of the last dimension: [..., 2n] -> [..., n]. To the bit what autograd gives."""
    return _SwiGlu.apply(x)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, -1)
        activated = F.silu(gate)
        ctx.save_for_backward(x, activated)
        return activated * up

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        x, activated = ctx.saved_tensors
        (gate, up), made = x.chunk(2, -1), torch.empty_like(x)
        of_gate, of_up = made.chunk(2, -1)
        torch.mul(gradient, activated, out=of_up)
        torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=of_gate)
        return made
