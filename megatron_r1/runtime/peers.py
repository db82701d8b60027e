"""Ranks of a job that hold one thing together, each its part: an engine that spans nodes."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from ipaddress import ip_address

import torch.distributed as dist

from megatron_r1.runtime.distributed import failing_together, gather_objects, rank, world_size
from megatron_r1.runtime.launch import address_towards


@dataclass(frozen=True)
class Peers:
    """The ranks that hold one thing together, as each of them sees the group."""

    ranks: tuple[int, ...]  #: the head first
    addresses: tuple[str, ...]  #: of their nodes
    group: dist.ProcessGroup  #: for objects and CPU tensors

    @property
    def number(self) -> int:
        """This rank's number among the peers; 0 is the head."""
        return self.ranks.index(rank())

    def gather(self, value: object) -> list:
        """The `value` of every peer, in their order. Collective among them."""
        return gather_objects(value, self.group)


def find_peers(ranks: tuple[int, ...], address: str, timeout_seconds: float) -> Peers | None:
    """This rank's peers; None if it has none. Collective: every rank of the job calls it.

    Args:
        ranks: this rank and its peers, the head first and the others in rising order; all peers pass the same.
        address: numeric address of this rank's node. A loopback address, to which a node's own name may resolve, is replaced if a
            peer has another.
        timeout_seconds: how long a peer waits for the others.
    """
    if world_size() == 1:
        return None
    known = gather_objects(address)
    outside = [known[peer] for peer in ranks if not ip_address(known[peer]).is_loopback]
    with failing_together():
        if outside and ip_address(address).is_loopback:
            address = address_towards(outside[0])
    everyone = gather_objects((ranks, address))
    found = None
    for members in sorted({members for members, _ in everyone if len(members) > 1}):
        group = dist.new_group(list(members), datetime.timedelta(seconds=timeout_seconds), backend="gloo")  # by all ranks
        if rank() in members:
            found = Peers(members, tuple(everyone[member][1] for member in members), group)
    return found
