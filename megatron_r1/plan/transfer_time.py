"""Seconds in which a policy's weights reach the engines, by the way that they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.update_time import PCIE
from megatron_r1.plan.work import ModelWork

Way = Literal["gathered", "broadcast", "peers", "resharded"]
_BF16 = 2.0
_CHECKSUMS = 1.0002  # of pieces, beside their bytes: what the weight sync's own counters show


@dataclass(frozen=True)
class TransferCosts:
    """What depends on programs rather than on devices: one set for all."""

    start: float = 0.24  #: seconds of a transfer, however small: ranks meet, caches are reset
    wake: float = 1.4  #: seconds more where trainer and engine share devices: one leaves them, the other takes memory
    gathered_tensor: float = 0.136e-3  #: seconds of a tensor that is gathered and loaded by its name
    packed_tensor: float = 0.087e-3  #: seconds of a tensor that is packed into a bucket and taken out of it
    sent_tensor: float = 0.028e-3  #: seconds of a tensor whose pieces are sent in a plan made before
    host: float = 3.2e9  #: bytes a second in which a rank's weights come back from its host, gradients' room with them
    gathered: float = 0.74  #: share of a link that gathering whole tensors on every rank reaches
    broadcast: float = 2.9  #: devices' links that broadcasts from several ranks keep busy
    peers: float = 4.8  #: the same, where every engine reads what it lacks from whoever has it
    tcp: float = 3.0e9  #: bytes a second that one process receives from other nodes over gloo, or sends. Assumed
    hash: float = 8.0e9  #: bytes a second of a checksum on a core (XXH3). Assumed
    sums: int = 10  #: times that a checksum on a device goes over a piece: its products are of 64 bits


TRANSFER_COSTS = TransferCosts()


@dataclass(frozen=True)
class SentShards:
    """This project's own way: ranks that hold the pieces give them to a rank that feeds workers of an engine (`rollout/sync`)."""

    shard: float  #: bytes that a worker holds
    sent: float  #: bytes that a rank of the trainer gives: the model's, times engines, over the ranks
    workers: int  #: that one rank feeds: those of its node, or of the whole engine over NCCL
    far: float  #: share of what a feeding rank gets that comes from other nodes
    through_host: bool  #: shm: through the node's memory, over TCP between nodes; else nccl
    verified: bool  #: `rollout.verify_weights`
    wakes: bool  #: whether the engine takes its memory back first


def shards_seconds(
    work: ModelWork, device: Accelerator, shards: SentShards, costs: TransferCosts = TRANSFER_COSTS
) -> dict[str, float]:
    """By part; "travel" is the slowest of the three sides, which work on different buckets at a time.

    A rank of the trainer gives what it `sent`; a feeding rank gets its workers' shards, over the links of one process; a worker
    takes its own. What is verified both read once more: through the host on a core, after a copy of it came back from the
    worker's device; over NCCL on the devices.
    """
    shard, sent = shards.shard * _CHECKSUMS, shards.sent * _CHECKSUMS
    fed = shards.workers * shard
    if shards.through_host:
        checked = 1 / costs.hash if shards.verified else 0.0
        give = sent * (1 / PCIE + checked + shards.far / costs.tcp)
        feed = fed * shards.far / costs.tcp
        take = shard * ((2 if shards.verified else 1) / PCIE + checked)
    else:
        checked = costs.sums / device.memory_rate if shards.verified else 0.0
        link = device.link_rate(True)
        give, feed, take = sent * (1 / link + checked), fed / link, shard * (1 / link + checked)
    return {
        "start": costs.start + costs.wake * shards.wakes, "names": work.tensors * costs.sent_tensor,
        "travel": max(give, feed, take),
    }  # fmt: skip


def transfer_seconds(
    work: ModelWork,
    device: Accelerator,
    *,
    way: Way,
    trainers: int,
    engines: int,
    element: float = _BF16,
    held: float = 0.0,
    costs: TransferCosts = TRANSFER_COSTS,
) -> dict[str, float]:
    """By part.

    Args:
        way: gathered: ranks beside engines gather whole tensors, of which the engine takes its part; broadcast: ranks send all
            tensors in buckets; peers: an engine reads what it lacks; resharded: ranks send the other's pieces, planned before.
        trainers, engines: devices on either side.
        element: bytes of a matrix element.
        held: bytes of weights that a rank fetches from its host first, where engine and trainer share devices.
    """
    size = work.parameters * element
    far = device.link_rate(max(trainers, engines) > device.domain or way != "gathered")
    if way == "resharded":
        pairs = min(trainers, engines)
        return {"start": costs.start, "names": work.tensors * costs.sent_tensor, "travel": size / pairs / far}
    if way == "gathered":
        return {
            "start": costs.start + costs.wake, "host": held / costs.host, "names": work.tensors * costs.gathered_tensor,
            "travel": size / (far * costs.gathered),
        }  # fmt: skip
    links = costs.broadcast if way == "broadcast" else costs.peers
    return {"start": costs.start, "names": work.tensors * costs.packed_tensor, "travel": size / (far * links)}
