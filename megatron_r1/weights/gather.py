"""Whole Hugging Face tensors from the shards of a running Megatron model, one after the other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.groups import WeightGroups, group_rank, group_size
from megatron_r1.weights.local_weights import expert_owner, local_weights, name_some, tensor_group
from megatron_r1.weights.mapping import Entry


@dataclass(frozen=True)
class GatheredWeights:
    """`gather_weights` of the same modules as often as it is iterated: a rollout engine that was lost is given them again."""

    modules: Sequence[torch.nn.Module]
    arch: Architecture
    groups: WeightGroups

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        return gather_weights(self.modules, self.arch, self.groups)


def gather_weights(
    modules: Sequence[torch.nn.Module], arch: Architecture, groups: WeightGroups
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, full tensor) for the whole model, in the order of the mapping table, on every rank.

    Collective: every rank must iterate to the end. A rank holds one tensor at a time, in addition to its own shards; tensors
    may be views of live parameters, so use or copy each before training goes on. Every call finds out anew which rank holds
    which tensor.

    Args:
        modules: this rank's Megatron modules without wrappers, one per virtual pipeline stage.
        arch: the model's shape.
        groups: this rank's process groups.

    Raises:
        ConversionError: on every rank and before anything is yielded: a Megatron tensor has no place in the table, or a
            tensor of the table is on no rank.
    """
    with failing_together():
        local = local_weights(modules, arch, groups)
    stages = _stages(local.tensors, len(local.entries), groups)
    with failing_together():
        missing = [entry.name for entry, stage in zip(local.entries, stages, strict=True) if stage is None]
        if missing:
            raise ConversionError(f"no rank holds these tensors: {name_some(missing)}")
    for i, (entry, found) in enumerate(zip(local.entries, stages, strict=True)):
        assert found is not None, "raised above"
        stage, dtype = found
        held = local.tensors[i][0] if i in local.tensors else None
        yield from _split_names(entry, _gather(entry, held, stage, dtype, arch, groups, _device_of(modules)))


def _stages(tensors: dict[int, list[torch.Tensor]], num_entries: int, groups: WeightGroups) -> list[tuple[int, torch.dtype] | None]:
    """Per entry the first pipeline stage that holds it and its dtype. With experts split, ranks of a stage hold the same
    numbers of experts, so a stage holds an expert if any of its expert-parallel ranks does."""
    mine = {i: held[0].dtype for i, held in tensors.items()}
    if group_size(groups.ep) > 1:
        shared: list[dict[int, torch.dtype]] = [{} for _ in range(group_size(groups.ep))]
        dist.all_gather_object(shared, mine, group=groups.ep)
        mine = {i: dtype for part in shared for i, dtype in part.items()}
    per_stage = [mine]
    if group_size(groups.pp) > 1:
        per_stage = [{} for _ in range(group_size(groups.pp))]
        dist.all_gather_object(per_stage, mine, group=groups.pp)
    stages: list[tuple[int, torch.dtype] | None] = [None] * num_entries
    for stage, held in reversed(list(enumerate(per_stage))):
        for i, dtype in held.items():
            stages[i] = (stage, dtype)
    return stages


def _gather(
    entry: Entry,
    held: torch.Tensor | None,
    stage: int,
    dtype: torch.dtype,
    arch: Architecture,
    groups: WeightGroups,
    device: torch.device,
) -> torch.Tensor:
    """The full Megatron tensor as one rank would hold it: over tensor, then expert, then pipeline parallelism."""
    owner = expert_owner(entry, arch, groups)
    full = None
    if group_rank(groups.pp) == stage and (entry.expert is None or group_rank(groups.ep) == owner):
        assert held is not None, "a rank of the stage that owns the tensor holds its part"
        full = _join(entry, _all_gather(held, tensor_group(entry, groups)))
    if entry.expert is not None and group_rank(groups.pp) == stage:
        full = _broadcast(full, owner, groups.ep, entry, dtype, device)
    return _broadcast(full, stage, groups.pp, entry, dtype, device)


def _all_gather(shard: torch.Tensor, group: dist.ProcessGroup | None) -> list[torch.Tensor]:
    if group_size(group) == 1:
        return [shard]
    shards = [torch.empty_like(shard, memory_format=torch.contiguous_format) for _ in range(group_size(group))]
    dist.all_gather(shards, shard.contiguous(), group=group)
    return shards


def _join(entry: Entry, shards: list[torch.Tensor]) -> torch.Tensor:
    parts = len(shards)
    if parts > 1:
        if entry.split is Split.GLU:  # every rank's gate, then every rank's up
            shards = [piece for pieces in zip(*(unfuse(entry, shard, parts) for shard in shards), strict=True) for piece in pieces]
        shards = [torch.cat(shards, 1 if entry.split is Split.ROW else 0)]
    return shards[0][: entry.full_shape[0]]  # without a vocabulary's padding


def _broadcast(
    tensor: torch.Tensor | None,
    source: int,
    group: dist.ProcessGroup | None,
    entry: Entry,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor:
    if group is None or group_size(group) == 1:
        assert tensor is not None, "a group of one holds the tensor"
        return tensor
    tensor = torch.empty(entry.full_shape, dtype=dtype, device=device) if tensor is None else tensor.contiguous()
    dist.broadcast(tensor, src=dist.get_global_rank(group, source), group=group)
    return tensor


def _split_names(entry: Entry, full: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    yield from zip(entry.hf, unfuse(entry, full), strict=True)
    for name in entry.copies:
        yield name, full


def _device_of(modules: Sequence[torch.nn.Module]) -> torch.device:
    return next(modules[0].parameters()).device
