"""Whether tensors hold numbers only: what is NaN or infinite is neither trained on nor stored."""

from __future__ import annotations

from collections.abc import Iterable

import torch


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite. Reads the tensor once and makes no copy of it; waits for its device."""
    if tensor.dtype is torch.float8_e4m3fn:  # it has NaN (all bits but the sign) and no infinity
        return not (tensor.contiguous().view(torch.uint8).bitwise_and(0x7F) == 0x7F).any()
    if tensor.numel() == 0 or not tensor.is_floating_point():
        return True
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())  # NaN wins over every number


def first_nonfinite(tensors: Iterable[tuple[str, torch.Tensor]]) -> str | None:
    """Name of the first tensor that is not finite; None if all are."""
    return next((name for name, tensor in tensors if not is_finite(tensor)), None)
