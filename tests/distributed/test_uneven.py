"""Gathering and reduce-scattering parts of different length over gloo, which expert tensor parallelism needs."""

from __future__ import annotations

import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

SIZES = [3, 1]


def worker(rank: int, port: int) -> None:
    """One of two ranks."""
    from megatron_r1.mcore import host

    host.activate("cpu")
    from megatron.core.tensor_parallel import mappings

    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    whole = torch.arange(8.0).view(4, 2)
    mine = whole.split(SIZES)[rank].clone().requires_grad_()
    gathered = mappings.gather_from_sequence_parallel_region(mine, group=dist.group.WORLD, output_split_sizes=SIZES)
    assert torch.equal(gathered, whole)
    (gathered * (rank + 1)).sum().backward()
    assert torch.equal(mine.grad, torch.full_like(mine, 3.0))  # the sum of both ranks' gradients
    scattered = mappings.reduce_scatter_to_sequence_parallel_region(
        whole * (rank + 1), group=dist.group.WORLD, input_split_sizes=SIZES
    )
    assert torch.equal(scattered, whole.split(SIZES)[rank] * 3)
    dist.destroy_process_group()


def test_uneven_parts_travel_both_ways() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    mp.spawn(worker, args=(port,), nprocs=2)
