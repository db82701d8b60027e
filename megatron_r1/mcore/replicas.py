"""Whether ranks that must hold the same weights do: one collective of checksums, before a run trains.

Held more than once are weights that tensor parallelism does not split, everything over data-parallel ranks, and the vocabulary's
tensors where several pipeline stages need them (tied embeddings, multi-token prediction). Training keeps replicas equal only by
computing the same everywhere: those which differ at the start would stay different, and only one of them be exported.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_r1.errors import ReplicasDiffer
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.runtime.distributed import failing_together, gather_objects
from megatron_r1.weights.checksum import checksum
from megatron_r1.weights.groups import WeightGroups, group_rank
from megatron_r1.weights.local_weights import LocalWeights, local_weights, name_some, tensor_group
from megatron_r1.weights.mapping import Entry, model_entries

_NOTHING = torch.iinfo(torch.int64).min  # the largest of no checksums


def check_replicas(modules: Sequence[torch.nn.Module], arch: Architecture, layout: Layout, groups: WeightGroups) -> None:
    """Compare all replicas of every weight. All ranks call this.

    A rank reads once what it holds and others hold too, and takes part in one reduction of 16 bytes for each part of a weight
    (`shared_parts`).

    Args:
        modules: this rank's Megatron modules without wrappers.
        arch: the model's shape.
        layout: how it is split.
        groups: this rank's process groups.

    Raises:
        ReplicasDiffer: on every rank, naming tensors and ranks.
    """
    parts = shared_parts(arch, layout)
    with failing_together():
        held = checksums(local_weights(modules, arch, groups), parts, groups)
    limits = extremes(held, sum(parts.values()))
    dist.all_reduce(limits, dist.ReduceOp.MAX)
    differing = disagreements(limits)
    if differing:
        of_ranks = gather_objects({place: held[place] for place in differing if place in held})
        raise ReplicasDiffer(describe(differing, of_ranks, parts, model_entries(arch)))


def shared_parts(arch: Architecture, layout: Layout) -> dict[int, int]:
    """Weights of which several places hold the same: index in `model_entries` -> into how many different parts each is cut."""
    expert_dp = layout.world_size // (layout.etp * layout.ep * layout.pp)
    parts = {}
    for i, entry in enumerate(model_entries(arch)):
        is_expert, is_whole = entry.expert is not None, entry.split is Split.REPLICATED
        tensor = layout.etp if is_expert else layout.tp
        places = (expert_dp if is_expert else layout.dp * layout.cp) * (tensor if is_whole else 1)
        if places > 1 or (entry.split is Split.VOCAB and layout.pp * layout.vpp > 1):
            parts[i] = 1 if is_whole else tensor
    return parts


def checksums(local: LocalWeights, parts: dict[int, int], groups: WeightGroups) -> dict[int, list[int]]:
    """This rank's part of the comparison: place in the vector of all parts -> signed checksums of what it holds there."""
    held, first = {}, 0
    for i, count in parts.items():
        if i in local.tensors:
            part = group_rank(tensor_group(local.entries[i], groups)) if count > 1 else 0
            held[first + part] = [_signed(checksum(tensor)) for tensor in local.tensors[i]]
        first += count
    return held


def extremes(held: dict[int, list[int]], places: int) -> torch.Tensor:
    """[2, places] int64: the largest checksum and the complement of the smallest, so that one maximum over ranks gives both."""
    limits = torch.full((2, places), _NOTHING, dtype=torch.int64)
    for place, sums in held.items():
        limits[0, place], limits[1, place] = max(sums), ~min(sums)
    return limits


def disagreements(limits: torch.Tensor) -> list[int]:
    """Places whose checksums are not all equal, given `extremes` of all ranks."""
    is_held = (limits != _NOTHING).any(0)
    return (is_held & (limits[0] != ~limits[1])).nonzero().flatten().tolist()


def describe(
    differing: Sequence[int], of_ranks: Sequence[dict[int, list[int]]], parts: dict[int, int], entries: Sequence[Entry]
) -> str:
    """One line that names the tensors, and who has which values."""
    named = {place: entries[i].name for place, i in enumerate(i for i, count in parts.items() for _ in range(count))}
    found = []
    for place in differing:
        ranks_with: dict[int, list[int]] = defaultdict(list)
        for rank, held in enumerate(of_ranks):
            for value in dict.fromkeys(held.get(place, [])):
                ranks_with[value].append(rank)
        groups = [f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}" for ranks in sorted(ranks_with.values())]
        found.append(f"{named[place]} ({' | '.join(groups)})")
    return (
        f"replicas of a weight differ: {name_some(found)}; ranks on either side of a bar have different values; "
        "nothing was trained: take an older checkpoint, or start again from model.weights"
    )


def _signed(value: int) -> int:
    """The same 64 bits as a signed integer."""
    return value - (1 << 64) if value >> 63 else value
