"""Which rank of a trainer gives which slice of which tensor to which rank of an engine, and in which bucket.

Both layouts are lists of boxes of tensors with Hugging Face names. An engine's worker says which it holds; of the trainer's ranks
each holds some, and several may hold the same one. The plan gives every worker every element of what it holds exactly once, each
from one rank that has it, and nothing else. It is made once by the rank that feeds the engine's workers, for these, and again when
either layout changes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import xxhash

from megatron_r1.errors import WeightSyncError
from megatron_r1.runtime.distributed import rank
from megatron_r1.weights.boxes import Box, intersect, slices_within, split_box, subtract, uncovered, volume, whole_box

ALIGNMENT = 16  #: bytes; every dtype can be viewed at such an offset
CHECKSUM_BYTES = 8  #: of each piece, behind the pieces of its source
_NAMED = 5  # tensors named in one message

Named = tuple[str, Box]  #: Hugging Face name and a box of the tensor


class Holders(Protocol):
    """What all ranks of a trainer hold."""

    def names(self) -> Iterable[str]:
        """Of all tensors."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Of the whole tensor; None if there is none of this name."""

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor."""

    def boxes(self, name: str) -> Sequence[tuple[Box, Sequence[int]]]:
        """Each box of it that ranks hold, with these ranks."""


class WeightSource(Protocol):
    """Weights that the ranks of a job hold together, each its part."""

    def describe(self) -> Any:
        """What this rank holds, in few bytes, for the other ranks. Equal descriptions mean the same."""

    def find_holders(self, described: Sequence[Any]) -> Holders:
        """What all ranks hold, from what each of them describes."""

    def read(self, name: str, box: Box) -> torch.Tensor:
        """A box that this rank holds; may be a view of what training changes."""


class StoredWeights:
    """A `WeightSource` that every rank reads for itself: a folder, or tensors in memory. A rank that feeds nobody needs none.

    Args:
        shapes: Hugging Face name -> shape and dtype of the tensor.
        read: returns a box of a tensor.
    """

    def __init__(self, shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]], read: Callable[[str, Box], torch.Tensor]) -> None:
        self._shapes, self.read = shapes, read

    @staticmethod
    def of_tensors(tensors: Mapping[str, torch.Tensor]) -> StoredWeights:
        """Tensors in memory."""

        def read(name: str, box: Box) -> torch.Tensor:
            tensor = tensors[name]
            return tensor[slices_within(box, whole_box(tensor.shape))]

        return StoredWeights({name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}, read)

    def describe(self) -> str:
        """See `WeightSource`: a digest."""
        return xxhash.xxh3_128_hexdigest(repr(list(self._shapes.items())).encode())

    def find_holders(self, described: Sequence[Any]) -> StoredWeights:
        """See `WeightSource`: no other rank is asked."""
        return self

    def names(self) -> Iterable[str]:
        """See `Holders`."""
        return self._shapes

    def shape(self, name: str) -> tuple[int, ...] | None:
        """See `Holders`."""
        return self._shapes[name][0] if name in self._shapes else None

    def dtype(self, name: str) -> torch.dtype:
        """See `Holders`."""
        return self._shapes[name][1]

    def boxes(self, name: str) -> Sequence[tuple[Box, Sequence[int]]]:
        """See `Holders`."""
        return [(whole_box(self._shapes[name][0]), (rank(),))]


@dataclass(frozen=True)
class ShardPiece:
    """A box of a tensor as its source writes it."""

    name: str
    box: Box
    dtype: torch.dtype
    offset: int  #: first byte, from the start of its part
    checksum_at: int  #: of its checksum, from the start of its part


@dataclass(frozen=True)
class GivenPart:
    """What one rank writes into a bucket: its pieces, then their checksums."""

    source: int
    start: int  #: first byte in the bucket
    stop: int
    pieces: list[ShardPiece]


@dataclass(frozen=True)
class TakenPiece:
    """A piece as a worker takes it out of a bucket."""

    index: int  #: of the worker's box
    box: Box  #: within the whole tensor
    dtype: torch.dtype
    offset: int  #: first byte, from the start of the worker's region
    checksum_at: int


@dataclass
class Bucket:
    """Regions one after the other, one for each destination."""

    regions: list[tuple[int, int]] = field(default_factory=list)  #: first byte and one behind the last of each destination's
    parts: list[GivenPart] = field(default_factory=list)

    @property
    def size(self) -> int:
        """In bytes."""
        return self.regions[-1][1]


@dataclass(frozen=True)
class FeedPlan:
    """What one rank feeds to workers, bucket by bucket."""

    buckets: list[Bucket]
    taken: list[list[list[list[TakenPiece]]]]  #: destination -> its workers -> buckets -> pieces

    @property
    def largest(self) -> int:
        """Bytes of the largest bucket."""
        return max((bucket.size for bucket in self.buckets), default=0)


def cover(wanted: Box, held: Sequence[tuple[Box, Sequence[int]]], prefer: Callable[[int], Any]) -> list[tuple[int, Box]] | None:
    """Boxes that tile `wanted`, each with the rank that gives it; None if ranks do not hold all of it.

    Args:
        held: boxes of the same tensor and the ranks that hold each.
        prefer: of a rank; among those that hold a box that with the least value gives it.
    """
    left, found = [wanted], []
    for box, ranks in held:
        shared = [part for piece in left if (part := intersect(piece, box)) is not None]
        if not shared:
            continue
        source = min(ranks, key=prefer)
        found += [(source, part) for part in shared]
        left = [rest for piece in left for rest in subtract(piece, box)]
        if not left:
            break
    return None if left else found


def check_names(engine: Iterable[Named], holders: Holders, is_unneeded: Callable[[str], bool]) -> None:
    """Raise WeightSyncError unless an engine and a trainer have the same tensors, and the engine each of them whole.

    Args:
        engine: boxes that all workers of the engine hold.
        is_unneeded: whether the engine does without a tensor of the trainer.
    """
    held: dict[str, set[Box]] = {}
    for name, box in engine:
        held.setdefault(name, set()).add(box)
    given = {name for name in holders.names() if not is_unneeded(name)}
    problems = {"sent but not held": given - held.keys(), "held but not sent": held.keys() - given}
    problems["of another shape"], problems["not held whole"] = set(), set()
    for name in given & held.keys():
        shape = holders.shape(name)
        assert shape is not None, "it is one of the trainer's"
        whole = whole_box(shape)
        if any(
            len(box) != len(whole) or any(stop > size for (_, stop), size in zip(box, shape, strict=True)) for box in held[name]
        ):
            problems["of another shape"].add(name)
        elif uncovered(whole, sorted(held[name])):
            problems["not held whole"].add(name)
    found = [f"{kind}: {list_some(sorted(names))}" for kind, names in problems.items() if names]
    if found:
        raise WeightSyncError(f"the rollout engine does not have the trainer's tensors: {'; '.join(found)}")


def list_some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def plan_feed(
    destinations: Sequence[Sequence[Sequence[Named]]], holders: Holders, prefer: Callable[[int], Any], bucket_bytes: int
) -> FeedPlan:
    """Plan what a rank feeds.

    Args:
        destinations: each a region of every bucket that some workers read, with the boxes of each of these workers. What several of
            them hold alike is in the region once.
        prefer: see `cover`; the fewest bytes given so far decide between equals.
        bucket_bytes: a bucket has at most so many, and a box is divided over buckets; at least 4 KiB for each destination.

    Raises:
        WeightSyncError: workers hold what no rank gives.
    """
    given: dict[int, int] = {}
    limit = max(bucket_bytes // max(len(destinations), 1), 4096)
    piled = [_pile(workers, holders, lambda at: (prefer(at), given.get(at, 0)), given, limit) for workers in destinations]
    plan = FeedPlan([], [[[] for _ in workers] for workers in destinations])
    for number in range(max(map(len, piled), default=0)):
        bucket, end = Bucket(), 0
        for destination, piles in enumerate(piled):
            start = end
            taken: list[list[TakenPiece]] = [[] for _ in destinations[destination]]
            for source, pile in _by_source(piles[number] if number < len(piles) else []).items():
                part, where = _lay_out(source, end, pile)
                bucket.parts.append(part)
                for piece, (_, readers) in zip(where, pile, strict=True):
                    shift = end - start
                    at = piece.offset + shift, piece.checksum_at + shift
                    for worker, index in readers:
                        taken[worker].append(TakenPiece(index, piece.box, piece.dtype, *at))
                end = part.stop
            bucket.regions.append((start, end))
            for of_worker, pieces in zip(plan.taken[destination], taken, strict=True):
                of_worker.append(pieces)
        plan.buckets.append(bucket)
    return plan


@dataclass(frozen=True)
class _Wanted:
    """A piece before it has a place."""

    name: str
    box: Box
    dtype: torch.dtype
    source: int

    @property
    def nbytes(self) -> int:
        return volume(self.box) * self.dtype.itemsize


_Pile = list[tuple[_Wanted, list[tuple[int, int]]]]  # pieces, and for each (worker, its box) that read it


def _pile(
    workers: Sequence[Sequence[Named]], holders: Holders, prefer: Callable[[int], Any], given: dict[int, int], limit: int
) -> list[_Pile]:
    """The pieces of one destination, bucket by bucket. All sources give some of each, so that all of them work all the time."""
    readers: dict[Named, list[tuple[int, int]]] = {}
    for worker, boxes in enumerate(workers):
        for index, named in enumerate(boxes):
            readers.setdefault(named, []).append((worker, index))
    pieces: _Pile = []
    missing = []
    for (name, box), of_box in readers.items():
        covered = None if holders.shape(name) is None else cover(box, holders.boxes(name), prefer)
        if covered is None:
            missing.append(name)
            continue
        dtype = holders.dtype(name)
        for source, part in covered:
            given[source] = given.get(source, 0) + volume(part) * dtype.itemsize
            most = (limit - 2 * ALIGNMENT - CHECKSUM_BYTES) // dtype.itemsize
            pieces += [(_Wanted(name, small, dtype, source), of_box) for small in split_box(part, most)]
    if missing:
        raise WeightSyncError(
            f"the rollout engine holds tensors that no rank of the trainer has: {list_some(sorted(set(missing)))}"
        )
    piles: list[_Pile] = []
    size = limit + 1
    for wanted, of_box in _interleaved(pieces):
        more = _aligned(wanted.nbytes) + CHECKSUM_BYTES + ALIGNMENT  # the end of a part is aligned, too
        if size + more > limit:
            piles.append([])
            size = 0
        piles[-1].append((wanted, of_box))
        size += more
    return piles


def _interleaved(pieces: _Pile) -> _Pile:
    """The pieces in the order in which all sources come to their ends together."""
    total: dict[int, int] = {}
    for wanted, _ in pieces:
        total[wanted.source] = total.get(wanted.source, 0) + wanted.nbytes
    done = dict.fromkeys(total, 0)
    keys = []
    for wanted, _ in pieces:
        done[wanted.source] += wanted.nbytes
        keys.append(done[wanted.source] / max(total[wanted.source], 1))
    return [pieces[i] for i in sorted(range(len(pieces)), key=keys.__getitem__)]


def _by_source(pile: _Pile) -> dict[int, _Pile]:
    found: dict[int, _Pile] = {}
    for entry in pile:
        found.setdefault(entry[0].source, []).append(entry)
    return found


def _lay_out(source: int, start: int, pile: _Pile) -> tuple[GivenPart, list[ShardPiece]]:
    offsets, end = [], 0
    for wanted, _ in pile:
        offsets.append(end)
        end += _aligned(wanted.nbytes)
    pieces = [
        ShardPiece(wanted.name, wanted.box, wanted.dtype, offset, end + CHECKSUM_BYTES * i)
        for i, ((wanted, _), offset) in enumerate(zip(pile, offsets, strict=True))
    ]
    return GivenPart(source, start, start + _aligned(end + CHECKSUM_BYTES * len(pile)), pieces), pieces


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
