"""The store in which the ranks of a job meet, listening on the job's network alone.

torch's own rendezvous listens at all addresses of rank 0's machine. The store takes orders from whoever reaches it, so it should be
reachable by no more machines than need it. (Under torchrun the store is torchrun's.)
"""

from __future__ import annotations

import datetime
import errno
import socket
import sys
from ipaddress import ip_address

import torch.distributed as dist

from megatron_r1.runtime.launch import LaunchInfo, torchrun_holds_store


def open_store(launch: LaunchInfo, timeout: datetime.timedelta) -> dist.Store:
    """The store at `launch.master_address`, which rank 0 holds. All ranks call this, and it waits for all.

    Raises:
        dist.DistError: the ranks did not meet in time, or the port is taken.
        OSError: the name of rank 0's machine is unknown, or rank 0 cannot listen there.
    """
    listener = None if launch.rank or torchrun_holds_store() else _listen(launch)
    return dist.TCPStore(
        launch.master_address,
        launch.master_port,
        launch.world_size,
        is_master=launch.rank == 0 and not torchrun_holds_store(),
        timeout=timeout,
        multi_tenant=not torchrun_holds_store(),
        master_listen_fd=None if listener is None else listener.detach(),
    )


def _listen(launch: LaunchInfo) -> socket.socket | None:
    """A socket at the job's address; None if torch has to listen at all addresses, and why stands on stderr then."""
    family, _, _, _, place = socket.getaddrinfo(launch.master_address, launch.master_port, type=socket.SOCK_STREAM)[0]
    if launch.local_world_size < launch.world_size and ip_address(str(place[0]).partition("%")[0]).is_loopback:
        _say_everywhere(launch, f"is {place[0]} on its own machine, which no other one reaches")
        return None
    try:
        return socket.create_server(place, family=family, backlog=max(launch.world_size, 128))
    except OSError as error:
        if error.errno != errno.EADDRNOTAVAIL:
            raise
        _say_everywhere(launch, f"is {place[0]}, no address of its own machine")
        return None


def _say_everywhere(launch: LaunchInfo, why: str) -> None:
    print(
        f"the ranks' meeting store listens at all addresses of rank 0's machine: MASTER_ADDR {launch.master_address} {why}; "
        "set it to that machine's address in the job's network",
        file=sys.stderr,
        flush=True,
    )
