"""Sums over ranks that cost nothing where there is one."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, *, group: dist.ProcessGroup) -> None:
    """torch's, in place. In a group of one, where gloo wakes a thread to change nothing, nothing is done."""
    if group.size() > 1:
        dist.all_reduce(tensor, op, group=group)
