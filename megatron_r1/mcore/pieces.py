"""Which piece of which weight each rank of a layout stores, checked against the mapping table.

Only `shards` asks Megatron-Core; this module does not import it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from megatron_r1.errors import ConversionError
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.local_weights import name_some
from megatron_r1.weights.mapping import Entry, model_entries


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
    elements: dict[int, int] = field(default_factory=dict)  #: rank -> elements that it holds, replicas included
    holders: dict[int, list[int]] = field(default_factory=dict)  #: entry -> ranks that hold it or a part of it, in no order

    def add(self, other: Shards) -> None:
        """Take over what other ranks hold."""
        self.pieces += other.pieces
        self.elements |= other.elements
        for entry, ranks in other.holders.items():
            self.holders.setdefault(entry, []).extend(ranks)


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
