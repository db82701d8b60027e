"""Boxes: ranges of the indices of a tensor, on every axis one."""

from __future__ import annotations

import math
from collections.abc import Sequence

Box = tuple[tuple[int, int], ...]  #: (first, one behind the last) on every axis; of a tensor without axes ()


def whole_box(shape: Sequence[int]) -> Box:
    """All of a tensor of this shape."""
    return tuple((0, size) for size in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Sizes of its axes."""
    return tuple(stop - start for start, stop in box)


def volume(box: Box) -> int:
    """Number of its elements."""
    return math.prod(stop - start for start, stop in box)


def along(shape: Sequence[int], axis: int | None, start: int, size: int) -> Box:
    """The part of a tensor that has `size` indices of one axis; with axis None all of it."""
    return tuple((start, start + size) if at == axis else (0, full) for at, full in enumerate(shape))


def intersect(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share; None if that is nothing."""
    shared = tuple((max(p[0], q[0]), min(p[1], q[1])) for p, q in zip(a, b, strict=True))
    return shared if all(start < stop for start, stop in shared) else None


def subtract(a: Box, b: Box) -> list[Box]:
    """Boxes that tile what is in `a` and not in `b`."""
    if intersect(a, b) is None:
        return [a]
    left, rest = [], a
    for axis, ((start, stop), (from_, to)) in enumerate(zip(a, b, strict=True)):
        for span in ((start, min(from_, stop)), (max(to, start), stop)):
            if span[0] < span[1]:
                left.append((*rest[:axis], span, *rest[axis + 1 :]))
        rest = (*rest[:axis], (max(start, from_), min(stop, to)), *rest[axis + 1 :])
    return left


def uncovered(wanted: Box, boxes: Sequence[Box]) -> list[Box]:
    """Boxes that tile what is in `wanted` and in none of the others."""
    left = [wanted]
    for box in boxes:
        left = [piece for part in left for piece in subtract(part, box)]
        if not left:
            break
    return left


def slices_within(box: Box, outer: Box) -> tuple[slice, ...]:
    """Where a box stands in a tensor that holds `outer`, which contains it."""
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in zip(box, outer, strict=True))


def split_box(box: Box, most: int) -> list[Box]:
    """Boxes of at most `most` elements that tile a box, in its order: along its first axis, or along the next one."""
    if volume(box) <= most:
        return [box]
    for axis, (start, stop) in enumerate(box):
        inner = math.prod(end - first for first, end in box[axis + 1 :])
        if inner <= most and stop - start > 1:
            step = most // inner
            return [(*box[:axis], (at, min(at + step, stop)), *box[axis + 1 :]) for at in range(start, stop, step)]
        if stop - start > 1:  # one index of this axis is too much
            lines = [(*box[:axis], (at, at + 1), *box[axis + 1 :]) for at in range(start, stop)]
            return [piece for line in lines for piece in split_box(line, most)]
    raise ValueError(f"a box cannot have less than one element: {most}")
