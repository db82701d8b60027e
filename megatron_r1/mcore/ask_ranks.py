"""What every rank of a layout stores, worked out on this machine by processes that build the ranks without their memory."""

from __future__ import annotations

import multiprocessing
import warnings
from concurrent.futures import ProcessPoolExecutor

import torch.distributed as dist

from megatron_r1.mcore import host
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.pieces import Shards, check_cover
from megatron_r1.model.architecture import Architecture
from megatron_r1.process_pools import starting_processes

_RANKS_PER_PROCESS = 64  # below, starting a process takes longer than the ranks do


def shards_of_layout(arch: Architecture, layout: Layout) -> Shards:
    """What every rank of the layout holds, held against the mapping table; without any of the layout's processes.

    A large layout is worked out by several processes of this machine, and so is one in a process that has joined a real group.

    Raises:
        ConfigError: this machine starts no processes.
        ConversionError: the ranks do not hold each element of the table's tensors exactly once.
    """
    processes = min(multiprocessing.cpu_count(), max(1, layout.world_size // _RANKS_PER_PROCESS))
    if processes == 1 and not dist.is_initialized():
        shards = _ask_ranks(arch, layout, range(layout.world_size))
    else:
        shards = Shards()
        ranks = [range(start, layout.world_size, processes) for start in range(processes)]
        with starting_processes("working out what the ranks of a layout store"):
            pool = ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"))
        with pool:
            for part in pool.map(_ask_ranks, [arch] * processes, [layout] * processes, ranks):
                shards.add(part)
    check_cover(shards, arch)
    return shards


def _ask_ranks(arch: Architecture, layout: Layout, ranks: range) -> Shards:
    # Here, because the process that asks others needs no Megatron-Core.
    warnings.filterwarnings("ignore", module=r"megatron\.core\b.*")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\b.*")
    host.activate("cpu")
    from megatron_r1.mcore.shards import shards_of_ranks

    return shards_of_ranks(arch, layout, ranks)
