"""Every value to the place before it in its sequence, as multi-token prediction shifts tokens and labels. No Megatron-Core.

Megatron-Core's own goes through packed sequences one by one, and under context parallelism sends four messages for each of them.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def shift_left(values: torch.Tensor, cu_seqlens: torch.Tensor | None, group: dist.ProcessGroup) -> torch.Tensor:
    """values [B, N] of this rank, each of them one place earlier in its sequence; 0 at the end of every sequence. Collective.

    Args:
        cu_seqlens: as `packing.packed_positions` takes it, up to the last token; None: each row is a sequence.
        group: context parallel; a rank has two parts of every sequence, in the order of `packing.local_token_indices`.
    """
    size, rank = group.size(), group.rank()
    if cu_seqlens is None:
        cu_seqlens = torch.tensor([0, values.shape[-1] * size], device=values.device)
    bounds = (cu_seqlens if cu_seqlens.dim() == 1 else cu_seqlens[0]).long() // size
    shifted = values.roll(-1, -1)
    if size == 1:
        shifted[..., bounds[1:] - 1] = 0
        return shifted
    # What follows a part is the first value of the next one: of the next rank after the first half of a sequence, of the one before
    # after the middle; the last rank has both parts beside the middle.
    middles = bounds[:-1] + bounds.diff() // 2
    own = torch.stack([values[..., bounds[:-1]], values[..., middles]])
    of_ranks = [torch.empty_like(own) for _ in range(size)]
    dist.all_gather(of_ranks, own, group=group)
    shifted[..., middles - 1] = of_ranks[rank + 1][0] if rank + 1 < size else own[1]
    shifted[..., bounds[1:] - 1] = of_ranks[rank - 1][1] if rank > 0 else torch.zeros_like(own[1])
    return shifted
