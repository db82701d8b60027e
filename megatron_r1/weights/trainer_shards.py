"""What each rank of a Megatron trainer holds of the model, as boxes of tensors with Hugging Face names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.weights.boxes import Box, along, slices_within, whole_box
from megatron_r1.weights.fused_tensors import unfuse
from megatron_r1.weights.groups import WeightGroups, group_rank, group_size
from megatron_r1.weights.local_weights import LocalWeights, entries_by_name, local_weights, tensor_group
from megatron_r1.weights.mapping import Entry


@dataclass(frozen=True)
class RankShards:
    """What one rank holds, in few bytes: some hundred for a rank of DeepSeek-V3, whatever the layout."""

    tp: tuple[int, int]  #: rank and size of tensor parallelism
    etp: tuple[int, int]  #: the same inside experts
    runs: tuple[tuple[int, int, torch.dtype], ...]  #: entries of the table that it holds: first, one behind the last, dtype
    vocabulary_rows: int  #: of its shards of embedding and output layer, padding included; 0 without one

    def boxes(self, entry: Entry) -> list[Box]:
        """Of each Hugging Face tensor of an entry that this rank holds."""
        rank, parts = self.tp if entry.expert is None else self.etp
        return shard_boxes(entry, rank, parts, self.vocabulary_rows)


def shard_boxes(entry: Entry, rank: int, parts: int, vocabulary_rows: int = 0) -> list[Box]:
    """What one of `parts` tensor-parallel ranks holds of each Hugging Face tensor of an entry.

    Args:
        vocabulary_rows: of each rank, padding included.
    """
    if entry.split is Split.REPLICATED:
        return [whole_box(shape) for shape in entry.shapes]
    if entry.split is Split.VOCAB:
        size = entry.shapes[0][0]
        first, stop = (min(at * vocabulary_rows, size) for at in (rank, rank + 1))
        return [along(entry.shapes[0], 0, first, stop - first)]
    axis = 1 if entry.split is Split.ROW else 0
    return [along(shape, axis, rank * (shape[axis] // parts), shape[axis] // parts) for shape in entry.shapes]


class TrainerShards:
    """The weights of running Megatron modules, live, as a `WeightSource`.

    Args:
        modules: this rank's Megatron modules without wrappers, one per virtual pipeline stage.
        arch: the model's shape.
        groups: this rank's process groups.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], arch: Architecture, groups: WeightGroups) -> None:
        self.modules, self.arch, self.groups = modules, arch, groups
        self._local: LocalWeights | None = None

    def describe(self) -> RankShards:
        """See `WeightSource`. Not collective.

        Raises:
            ConversionError: see `local_weights`.
        """
        local = self._local = local_weights(self.modules, self.arch, self.groups)
        tp, etp = ((group_rank(group), group_size(group)) for group in (self.groups.tp, self.groups.etp))
        rows = [held[0].shape[0] for i, held in local.tensors.items() if local.entries[i].split is Split.VOCAB]
        return RankShards(tp, etp, _held_runs({i: held[0].dtype for i, held in local.tensors.items()}), max(rows, default=0))

    def find_holders(self, described: Sequence[RankShards]) -> TrainerHolders:
        """See `WeightSource`."""
        return TrainerHolders(self.arch, described)

    def read(self, name: str, box: Box) -> torch.Tensor:
        """See `WeightSource`; a view if the rows of the tensor stand together in Megatron's."""
        local = self._local
        assert local is not None, "described before it is read"
        number, part = _places(self.arch)[name]
        entry, tensor = local.entries[number], local.tensors[number][0]
        group = tensor_group(entry, self.groups)
        rank, parts = group_rank(group), group_size(group)
        own = shard_boxes(entry, rank, parts, tensor.shape[0])[part]
        held = tensor if entry.split is Split.VOCAB else unfuse(entry, tensor, parts)[part]
        return held[slices_within(box, own)]


class TrainerHolders:
    """The `Holders` of a Megatron layout: what `described` ranks hold of the model's table."""

    def __init__(self, arch: Architecture, described: Sequence[RankShards]) -> None:
        self._entries, self._places, self._described = entries_by_name(arch)[0], _places(arch), described
        self._ranks: list[list[int]] = [[] for _ in self._entries]
        self._dtypes: list[torch.dtype | None] = [None] * len(self._entries)
        for rank, shards in enumerate(described):
            for start, stop, dtype in shards.runs:
                for entry in range(start, stop):
                    self._ranks[entry].append(rank)
                    self._dtypes[entry] = dtype

    def names(self) -> Sequence[str]:
        """See `Holders`; without names under which folders repeat a tensor."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Holders`; None also if no rank holds it."""
        if name not in self._places:
            return None
        number, part = self._places[name]
        return self._entries[number].shapes[part] if self._ranks[number] else None

    def dtype(self, name: str) -> torch.dtype:
        """See `Holders`."""
        dtype = self._dtypes[self._places[name][0]]
        assert dtype is not None, "a rank holds it"
        return dtype

    def boxes(self, name: str) -> list[tuple[Box, list[int]]]:
        """See `Holders`."""
        number, part = self._places[name]
        entry = self._entries[number]
        found: dict[tuple[tuple[int, int], int], list[int]] = {}
        for rank in self._ranks[number]:
            shards = self._described[rank]
            found.setdefault((shards.tp if entry.expert is None else shards.etp, shards.vocabulary_rows), []).append(rank)
        by_box: dict[Box, list[int]] = {}
        for ranks in found.values():
            box = self._described[ranks[0]].boxes(entry)[part]
            if all(start < stop for start, stop in box):
                by_box.setdefault(box, []).extend(ranks)
        return list(by_box.items())


@lru_cache(maxsize=1)
def _places(arch: Architecture) -> dict[str, tuple[int, int]]:
    """Hugging Face name -> its entry, and which of the entry's tensors it is."""
    return {name: (i, part) for i, entry in enumerate(entries_by_name(arch)[0]) for part, name in enumerate(entry.hf)}


def _held_runs(held: dict[int, torch.dtype]) -> tuple[tuple[int, int, torch.dtype], ...]:
    runs: list[tuple[int, int, torch.dtype]] = []
    for i in sorted(held):
        if runs and runs[-1][1:] == (i, held[i]):
            runs[-1] = (runs[-1][0], i + 1, held[i])
        else:
            runs.append((i, i + 1, held[i]))
    return tuple(runs)
