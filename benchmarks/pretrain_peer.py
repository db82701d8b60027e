"""The other side of `pretrain_step`, on each of its ranks: transformers as a plain training script runs it.

Nothing of ours is in its process but the rows and the plain loop: no Megatron-Core, no setting of the C library's heap.
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peer import Step, describe_peer, open_peer, peer_step
from benchmarks.pretrain_rows import random_rows
from benchmarks.side_ranks import Answer, serve, timed_steps


def over_ranks(step: Step, ranks: int) -> tuple[float, float]:
    """A step whose loss is the mean over ranks, for the comparison alone: training needs it on no rank."""
    loss, norm = step()
    if ranks == 1:
        return loss, norm
    total = torch.tensor(loss, dtype=torch.float64)
    dist.all_reduce(total)
    return total.item() / ranks, norm


class PeerRank:
    """What the orders to a rank of the peer do."""

    def __init__(self, arguments: argparse.Namespace, rank: int, ranks: int) -> None:
        self._arguments, self._rank, self._ranks = arguments, rank, ranks
        is_cuda = arguments.device == "cuda"
        self._device = torch.device(arguments.device, rank) if is_cuda else torch.device("cpu")
        self._synchronize = torch.cuda.synchronize if is_cuda else lambda: None
        self._step: Step | None = None

    def build(self, dtype: str, folder: str) -> Answer:
        """Read the weights of a folder, and make the first step. Collective."""
        self._step = None
        gc.collect()
        arguments, in_bf16 = self._arguments, dtype == "bf16"
        model = open_peer(Path(folder), self._device)
        rows = random_rows(model.config.vocab_size, arguments.rows, arguments.tokens, arguments.seed + self._rank)
        chosen, parameters = describe_peer(model), sum(parameter.numel() for parameter in model.parameters())
        if in_bf16 and arguments.peer_bf16 == "weights":
            model.to(torch.bfloat16)
        wrapped: torch.nn.Module = model
        if self._ranks > 1:
            wrapped = DistributedDataParallel(model, gradient_as_bucket_view=True, forward_sync_buffers=False)
        inputs, labels = {"input_ids": rows.token_ids.to(self._device)}, rows.labels.to(self._device)
        self._step = peer_step(wrapped, inputs, labels, autocast=in_bf16 and arguments.peer_bf16 == "autocast")
        return {"first": over_ranks(self._step, self._ranks), "transformers": chosen, "parameters": parameters}

    def steps(self, count: int) -> Answer:
        """See `timed_steps`."""
        assert self._step is not None
        return timed_steps(self._step, self._synchronize)(count)


def serve_peer(arguments: argparse.Namespace) -> None:
    """One rank, until there are no more orders."""
    torch.set_num_threads(1)
    place, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rank = PeerRank(arguments, place, ranks)
    serve({"build": rank.build, "steps": rank.steps})
    if ranks > 1:
        dist.destroy_process_group()
