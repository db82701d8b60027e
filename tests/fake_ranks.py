"""Every rank of a layout, one after the other in one process, with real weights: what collectives would do is left to the test."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.model import ParallelConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore import host
from megatron_r1.model.architecture import Architecture

host.activate("cpu")

from megatron.core import parallel_state

from megatron_r1.mcore import meta, parallel, provider


def built_ranks(
    arch: Architecture, world_size: int, **sizes: int
) -> Iterator[tuple[parallel.Layout, list[torch.nn.Module], parallel.Groups]]:
    """Layout, modules and groups of rank 0, then of rank 1, ...; the groups are there until the next rank is asked for."""
    layout = parallel.resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=arch.mtp_depth > 0)
    if dist.is_initialized():
        dist.destroy_process_group()
    with meta._quick_start():
        for rank in range(world_size):
            dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=world_size)
            try:
                parallel.build_process_groups(layout, seed=0)
                modules = provider.build_model(arch, layout, RuntimeConfig(), MoeTrainingConfig(), seed=7)
                yield layout, modules, parallel.groups()
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
