"""Reduce-scatter and all-gather of a buffer over gloo, without the copies of torch's own. Pure: no Megatron-Core.

torch's reduce-scatter over gloo is an all-reduce of a copy, and its all-gather goes through buffers of its own. Between two
processes of one machine, of 52 MB: 67 ms and 47 ms of processor time, here 17 and 11.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def reduce_scatter(output: torch.Tensor, input_: torch.Tensor, group: dist.ProcessGroup) -> None:
    """The sum over ranks, in their order, of this rank's part of `input_`.

    Args:
        output: [n]; it may be this rank's part of `input_`.
        input_: [ranks * n], contiguous.
        group: over gloo.
    """
    size, own = group.size(), group.rank()
    parts = list(input_.view(size, -1))
    others = [rank for rank in range(size) if rank != own]
    received = {rank: torch.empty_like(parts[rank]) for rank in others}
    works = [dist.irecv(received[rank], group=group, group_src=rank) for rank in others]
    works += [dist.isend(parts[rank], group=group, group_dst=rank) for rank in others]
    for work in works:
        if work is not None:
            work.wait()
    received[own] = parts[own] if own < 2 else parts[own].clone()  # before the first sum is written there
    if size == 1:
        output.copy_(received[0])
        return
    torch.add(received[0], received[1], out=output)
    for rank in range(2, size):
        output.add_(received[rank])


def all_gather(output: torch.Tensor, input_: torch.Tensor, group: dist.ProcessGroup) -> None:
    """Each rank's `input_` in its part of `output`.

    Args:
        output: [ranks * n], contiguous.
        input_: [n]; it may be this rank's part of `output`.
        group: over gloo.
    """
    parts = list(output.view(group.size(), -1))
    own = parts[group.rank()]
    if own.data_ptr() != input_.data_ptr():
        own.copy_(input_)
    for rank, part in enumerate(parts):
        dist.broadcast(part, group=group, group_src=rank)
