"""The metrics of an update, from those of its micro-batches."""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_r1.mcore.collectives import all_reduce
from megatron_r1.mcore.parallel import Groups
from megatron_r1.types import Metric


def reduce_metrics(results: list[dict[str, Metric[torch.Tensor]]], groups: Groups) -> dict[str, Metric[float]]:
    """Bring the metrics of micro-batches and data-parallel ranks together, and give them to all pipeline stages. Collective."""
    names = sorted(results[0]) if results else []
    largest = [name for name in names if results[0][name].reduction == "max"]
    added = [name for name in names if name not in largest]
    reduced: dict[str, Metric[float]] = {}
    if added:
        sums = torch.stack([torch.stack([r[n].value.double() for r in results]).sum() for n in added])
        all_reduce(sums, group=groups.dp)
        reduced |= {n: Metric(value, results[0][n].reduction) for n, value in zip(added, sums.tolist(), strict=True)}
    if largest:
        maxima = torch.stack([torch.stack([r[n].value.double() for r in results]).max() for n in largest])
        all_reduce(maxima, dist.ReduceOp.MAX, group=groups.dp)
        reduced |= {n: Metric(value, "max") for n, value in zip(largest, maxima.tolist(), strict=True)}
    box = [{name: reduced[name] for name in names}]
    if groups.pp.size() > 1:
        dist.broadcast_object_list(box, src=dist.get_process_group_ranks(groups.pp)[-1], group=groups.pp)
    return box[0]
