"""Which piece of which weight goes where in a distributed checkpoint, asked of Megatron-Core itself: the sharded state of
modules on the meta device, rank by rank."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch.distributed as dist

from megatron_r1.errors import ConversionError
from megatron_r1.mcore import host
from megatron_r1.mcore.meta import MetaRank, meta_ranks
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.local import local_weights, name_some
from megatron_r1.weights.mapping import Entry, model_entries

host.require_active()

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories, is_main_replica

from megatron_r1.mcore import parallel
from megatron_r1.mcore.checkpoint import _metadata as sharding_metadata


_RANKS_PER_PROCESS = 64  # below, starting a process takes longer than the ranks do


class Piece(NamedTuple):
    """A box of a checkpoint's tensor that one rank stores. Expert weights have the experts as a first axis there."""

    entry: int  #: index in `model_entries`
    key: str  #: the tensor's name in the checkpoint
    global_shape: tuple[int, ...]  #: of that tensor
    offset: tuple[int, ...]  #: of the box in it
    shape: tuple[int, ...]  #: of the box

    def area(self, dimensions: int) -> tuple[slice, ...]:
        """The box inside the unsplit Megatron tensor of the entry, which has this number of dimensions."""
        box = zip(self.offset[-dimensions:], self.shape[-dimensions:], strict=True)
        return tuple(slice(start, start + size) for start, size in box)


@dataclass
class Shards:
    """What some ranks of a layout hold."""

    pieces: list[Piece] = field(default_factory=list)  #: what they store: of replicas, one rank's
    objects: set[str] = field(default_factory=set)  #: names under which they store something that is empty here
    elements: dict[int, int] = field(default_factory=dict)  #: rank -> elements that it holds, replicas included
    holders: dict[int, list[int]] = field(default_factory=dict)  #: entry -> ranks that hold it or a part of it, in no order

    def add(self, other: Shards) -> None:
        """Take over what other ranks hold."""
        self.pieces += other.pieces
        self.objects |= other.objects
        self.elements |= other.elements
        for entry, ranks in other.holders.items():
            self.holders.setdefault(entry, []).extend(ranks)


def shards_of_ranks(arch: Architecture, layout: parallel.Layout, ranks: Iterable[int]) -> Shards:
    """Build the ranks and collect what each holds.

    Raises:
        ConversionError: a rank holds a tensor that the mapping table does not have, or with another shape.
    """
    shards = Shards()
    for rank, built in zip(ranks, meta_ranks(arch, layout, ranks), strict=True):
        _collect(shards, rank, built, arch)
    return shards


def shards_of_layout(arch: Architecture, layout: parallel.Layout) -> Shards:
    """What every rank of the layout holds, held against the mapping table; without any of the layout's processes.

    A large layout is worked out by several processes of this machine, and so is one in a process that has joined a real group.

    Raises:
        ConversionError: the ranks do not hold each element of the table's tensors exactly once.
    """
    processes = min(multiprocessing.cpu_count(), max(1, layout.world_size // _RANKS_PER_PROCESS))
    shards = Shards()
    if processes == 1 and not dist.is_initialized():
        shards = shards_of_ranks(arch, layout, range(layout.world_size))
    else:
        ranks = [range(start, layout.world_size, processes) for start in range(processes)]
        with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn"), host.activate, ("cpu",)) as pool:
            for part in pool.map(shards_of_ranks, [arch] * processes, [layout] * processes, ranks):
                shards.add(part)
    check_cover(shards, arch)
    return shards


def check_cover(shards: Shards, arch: Architecture) -> None:
    """Hold the pieces of all ranks of a layout against the mapping table.

    Raises:
        ConversionError: an element of the table's tensors, or of the checkpoint's, is stored by no rank or by several.
    """
    entries = model_entries(arch)
    of_entry: dict[int, list[Piece]] = {i: [] for i in range(len(entries))}
    of_key: dict[tuple[str, tuple[int, ...]], list[Piece]] = {}
    for piece in shards.pieces:
        of_entry[piece.entry].append(piece)
        of_key.setdefault((piece.key, piece.global_shape), []).append(piece)
    problems = [problem for i, pieces in of_entry.items() if (problem := _entry_problem(entries[i], pieces))]
    if len({key for key, _ in of_key}) < len(of_key):
        problems.append("ranks disagree about the shape of a tensor")
    for (key, shape), pieces in of_key.items():
        if problem := _count(shape, [tuple(slice(o, o + s) for o, s in zip(p.offset, p.shape, strict=True)) for p in pieces]):
            problems.append(f"{key} {problem}")
    if problems:
        raise ConversionError(f"the ranks of the layout do not hold the model exactly once: {name_some(problems)}")


def _collect(shards: Shards, rank: int, built: MetaRank, arch: Architecture) -> None:
    local = local_weights(built.modules, arch, built.groups)
    held = [(i, tensor) for i, tensors in local.tensors.items() for tensor in tensors]
    # Megatron-Core's sharded tensors are parameters or views of parts of them: the storage tells whose.
    entry_of = {tensor.untyped_storage()._cdata: i for i, tensor in held}
    shards.elements[rank] = sum(tensor.numel() for _, tensor in held)
    for i in local.tensors:
        shards.holders.setdefault(i, []).append(rank)
    for module in built.modules:
        state = module.sharded_state_dict(metadata=sharding_metadata())
        apply_factories(state)
        for part in nested_values(state):
            if not is_main_replica(part.replica_id):
                continue
            if isinstance(part, ShardedObject):
                shards.objects.add(part.unique_key)
            elif isinstance(part, ShardedTensor):
                shards.pieces.append(_piece(part, entry_of))


def _piece(part: ShardedTensor, entry_of: dict[int, int]) -> Piece:
    entry = entry_of.get(part.data.untyped_storage()._cdata)
    if entry is None:
        raise ConversionError(f"{part.key} would be stored, but is no weight of the mapping table")
    shape = (1,) * part.prepend_axis_num + tuple(part.local_shape)
    return Piece(entry, part.key, tuple(part.global_shape), tuple(part.global_offset), shape)


def _entry_problem(entry: Entry, pieces: Sequence[Piece]) -> str | None:
    dimensions = len(entry.full_shape)
    if any(piece.global_shape[-dimensions:] != entry.full_shape for piece in pieces):
        return f"{entry.name} has shape {list(pieces[0].global_shape[-dimensions:])}, expected {list(entry.full_shape)}"
    if problem := _count(entry.full_shape, [piece.area(dimensions) for piece in pieces]):
        return f"{entry.name} {problem}"
    return None


def _count(shape: tuple[int, ...], boxes: Sequence[tuple[slice, ...]]) -> str | None:
    """What is wrong with boxes that should tile a shape: every element in exactly one. None: nothing."""
    cuts = [sorted({0, size, *(box[axis].start for box in boxes), *(box[axis].stop for box in boxes)})
            for axis, size in enumerate(shape)]  # fmt: skip
    index = [{cut: i for i, cut in enumerate(axis)} for axis in cuts]
    times = np.zeros([len(axis) - 1 for axis in cuts], dtype=np.int32)  # one cell for every box of the grid of cuts
    for box in boxes:
        times[tuple(slice(at[part.start], at[part.stop]) for at, part in zip(index, box, strict=True))] += 1
    if (times == 0).any():
        return "is not held whole"
    return "is held more than once" if (times > 1).any() else None
