"""A conversion cut into parts of one file each, and shared out over processes."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

from megatron_r1.runtime.distributed import rank, world_size

P = TypeVar("P")
T = TypeVar("T")
R = TypeVar("R")

_PARTS = 64  # wanted at least: they are what processes share, and what an interrupted conversion does not do again
_SMALLEST = 32 << 20  # bytes
_AHEAD = 2  # items read before they are asked for


def part_bytes(total: int, max_file_bytes: int) -> int:
    """Size of a part of a conversion of `total` bytes; the same for any number of processes, so that others can go on with it."""
    return min(max_file_bytes, max(_SMALLEST, -(-total // _PARTS)))


def cut(sizes: Sequence[int], limit: int) -> list[range]:
    """Neighbouring items in parts of up to `limit` bytes; a larger item is a part of its own."""
    parts, start, size = [], 0, 0
    for i, nbytes in enumerate(sizes):
        if i > start and size + nbytes > limit:
            parts.append(range(start, i))
            start, size = i, 0
        size += nbytes
    return [*parts, range(start, len(sizes))] if sizes else []


def own_share(items: Sequence[T]) -> Sequence[T]:
    """The items of this process."""
    return items[rank() :: world_size()]


class OpenFile(Protocol):
    """A file being written, which appears when it is closed."""

    def discard(self) -> None:
        """Leave nothing of it."""


F = TypeVar("F", bound=OpenFile)


def write_parts(
    parts: Mapping[P, Sequence[T]],
    *,
    read: Callable[[T], R],
    open_file: Callable[[P], F],
    fill: Callable[[F, T, R], None],
    close: Callable[[F], None],
) -> None:
    """Write a file for every part, item by item; while one goes to disk the next is filled, and the items after are being read.

    Args:
        parts: part -> its items.
        read: what goes in for an item; called in a thread.
        open_file: begins the file of a part.
        fill: appends an item, of which it is given what was read.
        close: puts a file on disk; called in a thread.
    """
    todo = [(part, item) for part, items in parts.items() for item in items]
    found = read_ahead(lambda part_item: read(part_item[1]), todo)
    with ThreadPoolExecutor(1) as thread:
        closing: Future[None] | None = None
        for part, of_part in itertools.groupby(found, key=lambda pair: pair[0][0]):
            file = open_file(part)
            try:
                for (_, item), result in of_part:
                    fill(file, item, result)
                if closing is not None:
                    closing.result()
            except BaseException:
                file.discard()
                raise
            closing = thread.submit(close, file)
        if closing is not None:
            closing.result()


def read_ahead(read: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """(item, read(item)) one after the other, the next two being read while the caller works on the last."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[R]] = deque()
        for i, item in enumerate(items):
            coming.extend(thread.submit(read, items[j]) for j in range(i + len(coming), min(i + 1 + _AHEAD, len(items))))
            result = coming.popleft().result()
            yield item, result
            del result
