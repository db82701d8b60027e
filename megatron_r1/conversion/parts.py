"""A conversion cut into parts of one file each, and shared out over processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from megatron_r1.runtime.distributed import rank, world_size

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


def read_ahead(read: Callable[[T], R], items: Sequence[T]) -> Iterator[tuple[T, R]]:
    """(item, read(item)) one after the other, the next two being read while the caller works on the last."""
    with ThreadPoolExecutor(1) as thread:
        coming: deque[Future[R]] = deque()
        for i, item in enumerate(items):
            coming.extend(thread.submit(read, items[j]) for j in range(i + len(coming), min(i + 1 + _AHEAD, len(items))))
            result = coming.popleft().result()
            yield item, result
            del result
