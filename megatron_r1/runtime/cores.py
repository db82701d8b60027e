"""The processor cores of this node, and who shares them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from megatron_r1.runtime.distributed import gather_objects
from megatron_r1.runtime.launch import node_name

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
    try:
        most, period = quota.read_text(encoding="ascii").split()
        return min(cores, math.ceil(int(most) / int(period)))
    except (OSError, ValueError):  # no limit
        return cores


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
