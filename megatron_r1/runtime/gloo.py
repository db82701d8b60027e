"""One thread for all groups over gloo: torch gives each one of its own, which wakes up a hundred times a second even when idle."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d


@contextmanager
def sharing_the_worlds_thread() -> Iterator[None]:
    """Groups over gloo that are made in the block use network devices of the world's group, and with them its thread.

    Megatron-Core makes some 25 groups a rank; their threads together took a fifth of a core from small models. torch has no setting
    for it: `new_group` ignores `pg_options` of gloo. Where the world has no group over gloo, nothing changes.
    """
    devices = _devices_of_world()
    if not devices:
        yield
        return

    class Sharing(ProcessGroupGloo):
        def __init__(self, store: dist.Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
            options = ProcessGroupGloo._Options()
            options._timeout, options._devices, options._threads = timeout, devices, 2 * len(devices)  # torch's own numbers
            super().__init__(store, rank, size, options)

    distributed_c10d.ProcessGroupGloo = Sharing
    try:
        yield
    finally:
        distributed_c10d.ProcessGroupGloo = ProcessGroupGloo


def _devices_of_world() -> list[ProcessGroupGloo.Device]:
    world = dist.group.WORLD
    if world is None or torch.device("cpu") not in world._device_types:
        return []
    backend = world._get_backend(torch.device("cpu"))
    return list(backend.options._devices) if isinstance(backend, ProcessGroupGloo) else []
