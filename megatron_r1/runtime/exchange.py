"""What ranks tell each other about data that only some of them hold.

Small tables are added up, so that a rank's cost is the table whatever the number of ranks. Arrays go from the rank that holds them
to the one that needs them, in messages of bounded size. No rank ever receives what it does not need.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from megatron_r1.runtime.distributed import rank, world_size

T = TypeVar("T")

#: Bytes of a message between two ranks; a larger item goes alone.
MESSAGE_BYTES = 16 << 20
_NUMBER_BYTES = 4  # of a token or a log-probability

#: The arrays of one item: of numbers of four bytes each, in an order that sender and receiver agree on.
Arrays = Sequence[np.ndarray]


def add_tables(table: np.ndarray) -> np.ndarray:
    """The table whose every entry one rank has filled, the others having left it 0: to the bit what that rank wrote. Collective.

    Args:
        table: of float64, of one shape on every rank.
    """
    if world_size() == 1:
        return table
    # As integers, so that NaN, infinities and -0.0 come through.
    bits = torch.from_numpy(np.ascontiguousarray(table, dtype=np.float64).view(np.int64).copy())
    dist.all_reduce(bits)
    return bits.numpy().view(np.float64)


def gather_numbers(numbers: Sequence[float]) -> np.ndarray:
    """[ranks, n] float64: the numbers of every rank, equally many on each. Collective."""
    table = np.zeros((world_size(), len(numbers)))
    table[rank()] = numbers
    return add_tables(table)


def move_arrays(
    holders: Sequence[int], targets: Sequence[int], sizes: Sequence[Sequence[int]], held: Callable[[int], Arrays]
) -> dict[int, list[np.ndarray]]:
    """Send the arrays of every item from its holder to its target: item -> arrays as int32, for the items of this rank. Collective.

    Args:
        holders: rank of every item; the same on every rank, as are `targets` and `sizes`.
        targets: rank of every item.
        sizes: lengths of every item's arrays.
        held: the arrays of an item that this rank holds, each of numbers of four bytes.
    """
    outgoing: defaultdict[int, list[int]] = defaultdict(list)
    incoming: defaultdict[int, list[int]] = defaultdict(list)
    own, received = rank(), {}
    for item, (holder, target) in enumerate(zip(holders, targets, strict=True)):
        if holder == target == own:
            received[item] = [array.view(np.int32) for array in held(item)]
        elif holder == own:
            outgoing[target].append(item)
        elif target == own:
            incoming[holder].append(item)
    # All ranks go through the same order of (distance, message), so no circle of ranks waits for each other.
    for distance in range(1, world_size()):
        to, source = (own + distance) % world_size(), (own - distance) % world_size()
        sent, awaited = list(_bounded_messages(outgoing[to], sizes)), list(_bounded_messages(incoming[source], sizes))
        for number in range(max(len(sent), len(awaited))):
            under_way = []
            if number < len(awaited):
                buffer = torch.empty(sum(sum(sizes[item]) for item in awaited[number]), dtype=torch.int32)
                under_way.append(dist.irecv(buffer, source))
                received |= _split_arrays(buffer.numpy(), awaited[number], sizes)
            if number < len(sent):
                message = _join_arrays([array for item in sent[number] for array in held(item)])
                under_way.append(dist.isend(message, to))
            for transfer in under_way:
                assert transfer is not None, "this rank is in the group"
                transfer.wait()
    return received


def broadcast_arrays(
    items: Sequence[int],
    sizes: Sequence[Sequence[int]],
    held: Mapping[int, Arrays],
    source: int,
    group: dist.ProcessGroup,
    take: Callable[[int, list[np.ndarray]], None],
) -> None:
    """Give every rank of a group the arrays of the items that one of them holds, a message at a time. Collective in the group.

    Args:
        held: item -> arrays, on the rank `source`.
        take: is called with every item and its arrays as int32, on every rank. Arrays of one message share its memory.
    """
    is_source = rank() == source
    for message in _bounded_messages(items, sizes):
        if is_source:
            buffer = _join_arrays([array for item in message for array in held[item]])
        else:
            buffer = torch.empty(sum(sum(sizes[item]) for item in message), dtype=torch.int32)
        dist.broadcast(buffer, source, group=group)
        arrays = held if is_source else _split_arrays(buffer.numpy(), message, sizes)
        for item in message:
            take(item, list(arrays[item]))


def stream_to_rank_zero(owners: Sequence[int], make: Callable[[int], T]) -> Generator[T, None, None]:
    """What the owner of item 0, 1, ... makes of it: on rank 0, one item in memory at a time. Collective.

    All ranks go through the iterator to its end or close it; it is empty on the others, which make what they own meanwhile. An
    error in `make` is raised on the owner when all items are through, and rank 0 goes without the item.

    Args:
        owners: rank of every item, the same on every rank.
        make: gives something that can be pickled.
    """
    error: Exception | None = None
    numbers = iter(range(len(owners)))

    def pass_on(number: int) -> list[T]:
        nonlocal error
        owner, box = owners[number], []
        if owner == rank():
            try:
                box = [make(number)]
            except Exception as caught:  # noqa: BLE001 - raised below: rank 0 waits for the items that follow
                error = error or caught
        if rank() == owner != 0:
            dist.send_object_list([box], 0)
        elif rank() == 0 != owner:
            received: list[Any] = [None]
            dist.recv_object_list(received, owner)
            (box,) = received
        return box if rank() == 0 else []

    try:
        for number in numbers:
            yield from pass_on(number)
    finally:
        for number in numbers:  # of a reader that gave up
            pass_on(number)
    if error is not None:
        raise error


def _bounded_messages(items: Sequence[int], sizes: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The items in order, as many in one message as fit."""
    message: list[int] = []
    total = 0
    for item in items:
        size = sum(sizes[item]) * _NUMBER_BYTES
        if message and total + size > MESSAGE_BYTES:
            yield message
            message, total = [], 0
        message.append(item)
        total += size
    if message:
        yield message


def _join_arrays(arrays: Arrays) -> torch.Tensor:
    return torch.from_numpy(np.concatenate([array.view(np.int32) for array in arrays]))


def _split_arrays(buffer: np.ndarray, message: Sequence[int], sizes: Sequence[Sequence[int]]) -> dict[int, list[np.ndarray]]:
    """Views of the buffer."""
    bounds = np.cumsum([0, *(size for item in message for size in sizes[item])])
    parts = iter([buffer[start:end] for start, end in pairwise(bounds)])
    return {item: [next(parts) for _ in sizes[item]] for item in message}
