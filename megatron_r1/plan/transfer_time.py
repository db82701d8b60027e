"""Seconds in which a policy's weights reach the engines, by the way that they go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.work import ModelWork

Way = Literal["gathered", "broadcast", "peers", "resharded"]
_BF16 = 2.0


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


TRANSFER_COSTS = TransferCosts()


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
