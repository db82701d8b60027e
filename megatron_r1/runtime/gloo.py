"""One thread for all groups over gloo: torch gives each one of its own, which wakes up a hundred times a second even when idle."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroupGloo, distributed_c10d

_TORCH: Any = distributed_c10d
_GLOO: Any = ProcessGroupGloo  # torch's stubs have other names of its options


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
            options = _GLOO._Options()
            options._timeout, options._devices, options._threads = timeout, devices, 2 * len(devices)  # torch's own numbers
            super().__init__(store, rank, size, options)

    _TORCH.ProcessGroupGloo = Sharing
    try:
        yield
    finally:
        _TORCH.ProcessGroupGloo = ProcessGroupGloo


def _devices_of_world() -> list[Any]:
    world = dist.group.WORLD
    if world is None or torch.device("cpu") not in world._device_types:
        return []
    backend = world._get_backend(torch.device("cpu"))
    if not isinstance(backend, ProcessGroupGloo):
        return []
    options: Any = backend.options
    return list(options._devices)
