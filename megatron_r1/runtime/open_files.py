"""How many files and connections a rank has open at a time, and the limit of them.

Shells and Slurm often give a soft limit of 1,024, which the process may raise up to the hard one; 512 ranks need more.
"""

from __future__ import annotations

import resource
from collections.abc import Sequence

from megatron_r1.errors import DeviceError

_OF_A_PROCESS = 512  # libraries, logs, data, pipes to workers, and what CUDA opens for each GPU
_OF_A_GLOO_GROUP = 4  # what a group has beside a connection to each other member: measured, see the test
_OF_AN_NCCL_GROUP = 40  # a guess until a GPU says more: NCCL talks to a few neighbours over several channels
_OF_AN_ENGINE = 64  # its process or connection, its log, its memory file, the workers' group
_MOST = 1 << 20  # where the hard limit is none: some libraries walk through all numbers up to the limit
_GROUPS, _WORLD_GROUPS = 20, 9  # of Megatron-Core in one rank; of these the whole world, in the layout where most are


def needed_file_descriptors(world_size: int, group_sizes: Sequence[int] = (), engines: int = 1) -> int:
    """Descriptors that one rank needs.

    Every group over gloo connects each member with every other as it is made, and groups over NCCL have a side over gloo, too. On
    512 ranks with tensor 8, pipeline 16, expert 32 these are 1,315 connections, beside 511 of the world.

    Args:
        world_size: ranks of the job.
        group_sizes: members of each group that the rank is in (`mcore.layout.group_sizes`), without the world.
        engines: of which the rank holds a part.
    """
    groups = [world_size, *group_sizes]
    connections = sum(size - 1 for size in groups)
    return _OF_A_PROCESS + connections + (_OF_A_GLOO_GROUP + _OF_AN_NCCL_GROUP) * len(groups) + _OF_AN_ENGINE * engines


def most_file_descriptors(world_size: int) -> int:
    """What one rank needs in the layout that needs most: data-parallel ranks alone, of which most groups are the whole world."""
    return needed_file_descriptors(world_size, [world_size] * _WORLD_GROUPS + [1] * (_GROUPS - _WORLD_GROUPS))


def raise_open_files() -> None:
    """Raise this process's soft limit, which its children inherit, to the hard one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MOST if hard == resource.RLIM_INFINITY else min(hard, max(soft, _MOST))
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def hard_limit() -> int:
    """The most to which a process may raise its limit; 0: any number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    return 0 if hard == resource.RLIM_INFINITY else hard


def open_files_problem(needed: int) -> str | None:
    """Why a rank cannot have so many files open, and what to do; None if it can."""
    hard = hard_limit()
    if not hard or needed <= hard:
        return None
    return (
        f"a rank needs up to {needed} open files and connections, the hard limit is {hard}: raise it (ulimit -H -n, LimitNOFILE of "
        "slurmd or of the container)"
    )


def require_open_files(needed: int) -> None:
    """Raises DeviceError if a rank cannot have so many files open."""
    if problem := open_files_problem(needed):
        raise DeviceError(problem)


def describe_open_files() -> str:
    """The limits of this machine, and for how many ranks they are enough in any layout."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard = hard_limit()
    if not hard:
        return f"up to {soft}, any number is allowed -> enough for any number of ranks"
    ranks = next((count for count in (1 << power for power in range(16, -1, -1)) if most_file_descriptors(count) <= hard), 0)
    return f"up to {soft}, hard limit {hard} -> enough for {ranks} ranks in any layout"
