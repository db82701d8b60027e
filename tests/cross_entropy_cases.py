"""The cross entropy over a split vocabulary against torch's over the whole one, on any number of tensor-parallel ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

ROWS, VOCABULARY = (29, 2), 96


def draw(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [s, b, vocabulary] as wide as those of a trained model, labels [s, b] and the gradient of every token's loss."""
    generator = torch.Generator().manual_seed(5)
    logits = (torch.randn((*ROWS, VOCABULARY), generator=generator) * 12).to(dtype)
    labels = torch.randint(VOCABULARY, ROWS, generator=generator)
    return logits, labels, torch.randn(ROWS, generator=generator, dtype=torch.promote_types(dtype, torch.float32))


def run(
    cross_entropy: Callable[..., torch.Tensor], logits: torch.Tensor, labels: torch.Tensor, upstream: torch.Tensor, **more: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of every token, and the gradient of the logits; both may be written over what was given."""
    leaf = logits.clone().requires_grad_()
    loss = cross_entropy(leaf.clone(), labels, **more)
    loss.backward(upstream)
    return loss.detach(), leaf.grad


def check_temperatures(group: dist.ProcessGroup, device: str = "cpu") -> None:
    """bf16, fp32 and fp64 logits: loss and gradient are torch's in that width, on every rank of the group."""
    from megatron_r1.mcore.cross_entropy import vocab_parallel_cross_entropy

    width = VOCABULARY // group.size()
    mine = slice(group.rank() * width, (group.rank() + 1) * width)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        logits, labels, upstream = (tensor.to(device) for tensor in draw(dtype))
        epsilon = torch.finfo(upstream.dtype).eps
        for temperature in (1.0, 0.7, 1.9):
            whole = logits.to(upstream.dtype, copy=True).requires_grad_()
            want = -(whole / temperature).log_softmax(-1).gather(-1, labels[..., None])[..., 0]
            want.backward(upstream)
            loss, gradient = run(
                vocab_parallel_cross_entropy, logits[..., mine].contiguous(), labels, upstream, temperature=temperature, group=group
            )
            assert loss.dtype == upstream.dtype and gradient.dtype == dtype
            assert (loss - want).abs().max() < 2 * epsilon * want.abs().max() + 8 * epsilon, (dtype, temperature)
            rounding = max(torch.finfo(dtype).eps, 16 * epsilon)
            off = (gradient - whole.grad[..., mine]).abs() / (whole.grad[..., mine].abs() + 16 * epsilon)
            assert off.max() < rounding, (dtype, temperature, off.max())
