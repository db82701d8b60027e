"""Ranks of a job that hold one thing together, each its part: an engine that spans nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_address

import torch.distributed as dist

from megatron_r1.runtime.distributed import collective_timeout, failing_together, gather_objects, rank, world_size
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


def find_peers(ranks: tuple[int, ...], address: str) -> Peers | None:
    """This rank's peers; None if it has none. Collective: every rank of the job calls it.

    Args:
        ranks: this rank and its peers, the head first and the others in rising order; all peers pass the same.
        address: numeric address of this rank's node. A loopback address, to which a node's own name may resolve, is replaced if a
            peer has another.
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
    for members in groups_of_peers([members for members, _ in everyone]):
        group = dist.new_group(list(members), collective_timeout(), backend="gloo")
        if rank() in members:
            found = Peers(members, tuple(everyone[member][1] for member in members), group)
    return found


def groups_of_peers(ranks: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The groups that all ranks make together, members or not, in the same order: making one is collective over the world.

    Args:
        ranks: what each rank of the job gave to `find_peers`.

    Raises:
        ValueError: two ranks of a group do not mean the same one.
    """
    groups = sorted({members for members in ranks if len(members) > 1})
    for members in groups:
        for member in members:
            if ranks[member] != members:
                raise ValueError(f"rank {member} is one of the peers {members}, but means {ranks[member]}")
    return groups
