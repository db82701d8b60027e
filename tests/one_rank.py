"""A world of one rank, for tests of what works over process groups."""

from __future__ import annotations

import torch.distributed as dist


def one_rank_world() -> None:
    """A process group of this process alone, unless there is one; it ends with the test file."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
