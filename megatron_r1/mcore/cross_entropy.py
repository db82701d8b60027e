"""Cross entropy over a vocabulary that is split over tensor-parallel ranks: Megatron-Core's numbers in a third of its memory.

`megatron.core.tensor_parallel.vocab_parallel_cross_entropy` knows no temperature and keeps a float32 softmax for the backward pass.
Here the logits themselves are kept, in their own dtype: whatever is wider exists for some rows at a time. Those that are as wide
already become their exponentials in place, which the backward pass then need not compute again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.collectives import all_reduce

require_active()

from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Pieces

from megatron_r1.mcore.activation_bytes import WIDE_LOGITS, WIDE_LOGITS_ON_CPU


def vocab_parallel_cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, *, temperature: float, group: dist.ProcessGroup
) -> torch.Tensor:
    """-log p [s, b] of labels [s, b] under softmax(logits / temperature), in nats and float32. Collective in `group`.

    The logits are divided in float32, as the rollout engine does it. At temperature 1 result and gradient are, bit by bit, those of
    `megatron.core.tensor_parallel.vocab_parallel_cross_entropy`.

    Args:
        logits: [s, b, vocabulary / tp], contiguous: this rank's part. Both passes write over them, so nobody else may read them
            afterwards; a second backward pass raises RuntimeError.
        labels: [s, b] ids of the whole vocabulary, the same on every rank.
        temperature: above 0.
        group: the tensor-parallel ranks, in the order of their parts.
    """
    return _CrossEntropy.apply(logits, labels, temperature, group)


class _CrossEntropy(torch.autograd.Function):
    """Megatron-Core's steps (its class `VocabParallelCrossEntropy`), some rows at a time and again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, labels: torch.Tensor, temperature: float, group: dist.ProcessGroup) -> torch.Tensor:
        rows, targets = logits.view(-1, logits.shape[-1]), labels.flatten()
        first = group.rank() * rows.shape[1]
        largest = rows.amax(-1).to(_wide(logits)).div_(temperature)
        all_reduce(largest, dist.ReduceOp.MAX, group=group)
        predicted, total = torch.empty_like(largest), torch.empty_like(largest)
        for part in _parts(rows):
            _, _, predicted[part], total[part], _ = _exponentials(rows[part], targets[part], largest[part], temperature, first)
        all_reduce(predicted, group=group)
        all_reduce(total, group=group)
        ctx.save_for_backward(logits, targets, largest, total)
        ctx.temperature, ctx.first = temperature, first
        return (total.log() - predicted).view_as(labels)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        logits, targets, largest, total = ctx.saved_tensors
        rows, upstream = logits.view(-1, logits.shape[-1]), gradient.flatten() / ctx.temperature
        for part in _parts(rows):
            if _is_wide(rows):
                wide = rows[part]
                elsewhere, own = _targets_here(targets[part], ctx.first, rows.shape[1])
            else:
                elsewhere, own, _, _, wide = _exponentials(rows[part], targets[part], largest[part], ctx.temperature, ctx.first)
            wide.div_(total[part].unsqueeze(-1))
            grad_2d, numbers, is_here, wide = Pieces.prepare_gradient_calculation_operands(wide, elsewhere)
            gradients = Pieces.calculate_gradients(grad_2d, numbers, own, is_here, wide, upstream[part])
            if gradients.data_ptr() != rows[part].data_ptr():
                rows[part] = gradients
        return logits, None, None, None


def _wide(logits: torch.Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _is_wide(logits: torch.Tensor) -> bool:
    return logits.dtype == _wide(logits)


def _targets_here(targets: torch.Tensor, first: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whether each target is another rank's, and its place here, as `_exponentials` gives them."""
    elsewhere = (targets < first) | (targets >= first + width)
    return elsewhere, (targets - first).masked_fill_(elsewhere, 0)


def _parts(rows: torch.Tensor) -> list[slice]:
    most = min(WIDE_LOGITS, WIDE_LOGITS_ON_CPU) if rows.is_cpu else WIDE_LOGITS
    step = max(1, most // rows.shape[1])
    return [slice(start, start + step) for start in range(0, rows.shape[0], step)]


def _exponentials(
    rows: torch.Tensor, targets: torch.Tensor, largest: torch.Tensor, temperature: float, first: int
) -> tuple[torch.Tensor, ...]:
    """Whether each target is another rank's, its place here, its logit less the largest, the sum of exponentials, and those."""
    wide = rows.to(_wide(rows))  # in place if they are
    if temperature != 1.0:
        wide.div_(temperature)
    return Pieces.calculate_predicted_logits(wide, targets, largest, first, first + rows.shape[1])
