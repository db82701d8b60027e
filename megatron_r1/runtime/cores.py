"""The processor cores of this node, and who shares them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.runtime.distributed import gather_objects
from megatron_r1.runtime.launch import node_name, requested_threads

_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # "<microseconds or max> <of so many>"; only cgroup version 2 has it


@dataclass(frozen=True)
class SharedCores:
    """The cores that this process may run on."""

    number: int
    ranks: int = 1  #: ranks of this node that may run on some of them, this one included
    users: int = 1  #: of these, who start processes of their own


def usable_cores(quota: Path = _QUOTA) -> int:
    """Cores that this process may run on; fewer where a container's processor time is limited."""
    cores = len(os.sched_getaffinity(0))
    return min(cores, _container_limit(quota) or cores)


def _container_limit(quota: Path) -> int | None:
    """Of a container's processor time, in cores, at least 1; None: there is none."""
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return max(1, math.ceil(int(most) / int(period)))
    except (OSError, ValueError):
        return None


def share_cores(uses: bool) -> SharedCores:
    """How the ranks of this node share its cores. Collective.

    Launchers bind each rank to cores of its own, or none to any: ranks share the cores that they have in common.

    Args:
        uses: whether this rank starts processes of its own.
    """
    mine = os.sched_getaffinity(0)
    known = gather_objects((node_name(), sorted(mine), uses))
    sharing = [of_rank for node, cores, of_rank in known if node == node_name() and mine.intersection(cores)]
    return SharedCores(usable_cores(), len(sharing), max(1, sum(sharing)))


def choose_threads(local_ranks: int, quota: Path = _QUOTA) -> tuple[int, str]:
    """OpenMP threads of this rank, and why so many: OMP_NUM_THREADS, else its part of the cores. Collective.

    An engine takes turns with its trainer, so each of them gets so many. While one waits its threads sleep: libgomp, which torch
    brings along, lets them spin for some milliseconds, and Intel's library for 0.2 s.

    Args:
        local_ranks: of this node. A container's limit is one of all of them, also where each is bound to cores of its own.
    """
    shared = share_cores(False)
    asked = requested_threads()
    if asked is not None:
        return asked, f"OMP_NUM_THREADS={asked}"
    limit = _container_limit(quota)
    number = max(1, min(shared.number // shared.ranks, limit // local_ranks if limit else shared.number))
    processes = "1 process has" if shared.ranks == 1 else f"{shared.ranks} processes share"
    limited = f", processor time for {limit}" if limit and limit // local_ranks == number else ""
    return number, f"{processes} {shared.number} {'core' if shared.number == 1 else 'cores'}{limited}"
