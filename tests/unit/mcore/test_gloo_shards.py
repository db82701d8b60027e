"""A buffer's parts are summed and gathered among ranks as torch does it."""

from __future__ import annotations

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from megatron_r1.mcore.gloo_shards import all_gather, reduce_scatter

PART = 5


def rank_of(rank: int, port: int, size: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, size, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    group = dist.group.WORLD
    numbers = [torch.randn(size * PART, generator=torch.Generator().manual_seed(r)) for r in range(size)]
    total = numbers[0].clone()
    for other in numbers[1:]:
        total += other  # in the order of ranks
    own = slice(rank * PART, (rank + 1) * PART)
    buffer, beside = numbers[rank].clone(), torch.empty(PART)
    reduce_scatter(beside, buffer, group)
    assert torch.equal(beside, total[own]) and torch.equal(buffer, numbers[rank])
    reduce_scatter(buffer[own], buffer, group)  # in place
    assert torch.equal(buffer[own], total[own])
    buffer[: rank * PART], buffer[(rank + 1) * PART :] = 0.0, 0.0
    all_gather(buffer, buffer[own], group)
    assert torch.equal(buffer, total)
    everything = torch.empty(size * PART)
    all_gather(everything, beside, group)
    assert torch.equal(everything, total)
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_parts_travel_both_ways(size: int) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(rank_of, args=(port, size), nprocs=size)
