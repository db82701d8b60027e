"""The process group, and how ranks fail together.

A rank that raises while its peers wait in a collective leaves them hanging. Work that only one rank does, or that can fail
on one rank alone, therefore runs under `on_rank_zero` or `failing_together`: every rank then raises the same error.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from megatron_r1.errors import DeviceError, one_line
from megatron_r1.runtime.device import Device
from megatron_r1.runtime.launch import LaunchInfo, launched_rank
from megatron_r1.runtime.meeting import open_store
from megatron_r1.runtime.waiting import close_waiting_place, open_waiting_place, wait_for_all

T = TypeVar("T")


_STORE: dist.Store | None = None  # where the ranks met; it serves `claim_error_line` after the process group is gone


_MEETING_SECONDS = 1800.0
_timeout = datetime.timedelta(seconds=_MEETING_SECONDS)  # of every process group


def join_process_group(launch: LaunchInfo, device: Device, timeout_seconds: float = 1800.0) -> None:
    """Join the process group, also as its only member. Raises DeviceError if the ranks cannot meet.

    Args:
        timeout_seconds: how long a rank waits for the others in a collective of any group.
    """
    global _STORE, _timeout
    _timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        _STORE = open_store(launch, min(_timeout, datetime.timedelta(seconds=_MEETING_SECONDS)))
        # Without `device_id`, with which torch makes every later group by splitting NCCL's communicator of the world: a
        # collective of all ranks, which the members of a group over gloo leave out (docs/decisions.md).
        dist.init_process_group(device.backend, store=_STORE, rank=launch.rank, world_size=launch.world_size, timeout=_timeout)
        open_waiting_place(_STORE, launch.world_size, timeout_seconds)
    except (dist.DistError, OSError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).splitlines()[0]
        raise DeviceError(f"rank {launch.rank} cannot join at {launch.master_address}:{launch.master_port}: {reason}") from None


def collective_timeout() -> datetime.timedelta:
    """How long a rank waits in a collective: the timeout of every group that is made (`runtime.collective_timeout_seconds`)."""
    return _timeout


def shutdown() -> None:
    """Leave the process group, if there is one."""
    close_waiting_place()
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's rank; 0 before `join_process_group`."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Number of ranks; 1 before `join_process_group`."""
    return dist.get_world_size() if dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Whether this process writes the files and prints the lines."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    gather_objects(None)  # objects travel over gloo, so no GPU stream is involved


def broadcast_object(value: T | None) -> T:
    """Rank 0's `value` on every rank; what the others pass is ignored. The value must be picklable."""
    if world_size() == 1:
        return cast(T, value)
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return cast(T, box[0])


def gather_objects(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """The `value` of every rank (of `group`, if one is given), in the order of ranks, on every rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


def gather_on_rank_zero(value: T) -> list[T]:
    """The `value` of every rank, in the order of ranks, on rank 0; nothing on the others."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size() if is_rank_zero() else []
    dist.gather_object(value, values or None)
    return values


def any_rank(*flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank. Cheap enough for every step."""
    if world_size() == 1:
        return list(flags)
    counts = torch.tensor(flags, dtype=torch.int32)
    dist.all_reduce(counts, dist.ReduceOp.MAX)
    return [bool(count) for count in counts.tolist()]


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 and return its result, or raise its error, on every rank."""
    result: T | None = None
    error: Exception | None = None
    if is_rank_zero():
        try:
            result = work()
        except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
            error = caught
    result, error = broadcast_object((result, error))
    if error is not None:
        raise error
    return cast(T, result)


def kept_on_rank_zero(work: Callable[[], T]) -> T | None:
    """Run `work` on rank 0, whose result stays there (an open file cannot travel); None on the others, its error on all."""
    kept: list[T] = []

    def keep() -> None:
        kept.append(work())

    on_rank_zero(keep)
    return kept[0] if kept else None


@contextmanager
def failing_together(group: dist.ProcessGroup | None = None, is_long: bool = False) -> Iterator[None]:
    """If any rank's block raises, every rank (of the `group`) raises: its own error, else that of the lowest rank that failed.

    The block must contain no collective that the failing rank might skip.

    Args:
        is_long: some ranks may take longer than a collective's timeout and give signs of life meanwhile. Without a `group` only.
    """
    error = None
    try:
        yield
    except Exception as caught:  # noqa: BLE001 - raised again below, on every rank
        error = caught
    if is_long:
        wait_for_all()
    errors = [other for other in gather_objects(error, group) if other is not None]
    if error is not None:
        raise error
    if errors:
        raise errors[0]


class SharedCounter:
    """A number that begins with 0 and to which ranks add, each without waiting for the others. Made by all ranks together."""

    def __init__(self) -> None:
        self._name = broadcast_object(f"megatron_r1/counters/{secrets.token_hex(8)}")
        self._value = 0

    def add(self, amount: int) -> int:
        """The number after `amount` is added.

        Raises:
            DeviceError: rank 0, which holds the number, is gone.
        """
        if world_size() == 1:
            self._value += amount
            return self._value
        try:
            return cast(dist.Store, _STORE).add(self._name, amount)
        except dist.DistError as error:
            raise DeviceError(f"rank {rank()} does not reach the store of rank 0: {one_line(error)}") from None


def claim_error_line() -> bool:
    """True for the one rank that prints why the job ends: the first that asks, so that an error of any one rank is printed.

    Before `join_process_group` it is the rank that the launcher calls 0.
    """
    if _STORE is None:
        return launched_rank() == 0
    try:
        return _STORE.add("megatron_r1/error_lines", 1) == 1
    except dist.DistError:
        return False  # rank 0, which holds the store, is gone and has printed why
