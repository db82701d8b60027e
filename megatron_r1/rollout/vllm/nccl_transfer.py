"""Weight transfer over NCCL in buckets, both halves, on vLLM's communicator. For CUDA.

Every bucket is one call to the engine beside one message to each worker, with this worker's pieces. vLLM's own nccl back end sends
all weights within one call, which at 1,342 GB gives no sign of life for minutes, and loads them by the layerwise reload (see
`in_place.py`). This has not been run: no GPU was at hand; tests play the communicator.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.options import EngineOptions
from megatron_r1.rollout.sync.links import Call, EngineLink
from megatron_r1.rollout.sync.transfer import SLOTS
from megatron_r1.rollout.vllm.in_place import InPlaceTransfer, NumberedBucket
from megatron_r1.runtime.launch import free_port
from megatron_r1.weights.shard_plan import FeedPlan, Named

NCCL_BACKEND = "nccl_buckets"


class Communicator(Protocol):
    """What is needed of vLLM's `PyNcclCommunicator`."""

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send the tensor to a rank; enqueued on the current stream."""

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Receive a tensor from a rank; enqueued on the current stream."""

    def destroy(self) -> None:
        """Abort what is going on and leave."""


@dataclass
class NcclMeeting(WeightTransferInitInfo):
    """Where trainer and workers meet."""

    address: str  #: of the trainer, numeric
    port: int
    world_size: int  #: the trainer, rank 0, and the engine's workers
    timeout_seconds: float  #: for the meeting


Join = Callable[[NcclMeeting, int, torch.device], Communicator]


def join_nccl(meeting: NcclMeeting, rank: int, device: torch.device) -> Communicator:
    """One NCCL group of the trainer and the workers of an engine. All of them call this at a time.

    Raises EngineLost if NCCL cannot be loaded; vLLM's communicator would then do nothing.
    """
    from vllm.distributed.device_communicators.pynccl import PyNcclCommunicator
    from vllm.distributed.utils import StatelessProcessGroup
    from vllm.utils.nccl import unpinned_nccl_env

    group = StatelessProcessGroup.create(
        meeting.address, meeting.port, rank, meeting.world_size, store_timeout=max(1, round(meeting.timeout_seconds))
    )
    with unpinned_nccl_env():
        communicator = PyNcclCommunicator(group, device=device)
    if communicator.disabled:
        raise EngineLost("rollout.transfer=nccl: NCCL cannot be loaded here")
    return communicator


class NcclLink(EngineLink):
    """From a rank to all workers of an engine; see `sync.transfer.WeightLink`.

    Args:
        call: of the engine.
        address: under which the workers reach this process.
        timeout_seconds: for the meeting.
        device: of the buckets.
        join: see `join_nccl`.
    """

    def __init__(
        self,
        call: Call,
        options: EngineOptions,
        address: str,
        timeout_seconds: float,
        device: torch.device,
        join: Join = join_nccl,
    ) -> None:
        super().__init__(call, options)
        self.device = device
        self._group: Communicator | None = None
        self._slots: list[torch.Tensor] = []
        self._regions: list[list[tuple[int, int]]] = []
        self._size = 0
        meeting = NcclMeeting(address, free_port(""), 1 + options.tensor_parallel_size, timeout_seconds)
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(call, "init_weight_transfer_engine", vars(meeting))
            self._group = join(meeting, 0, device)
            answer.result()

    def close(self) -> None:
        """See `EngineLink`."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()

    def release(self) -> None:
        """Give the buckets back until the next update: training needs the memory."""
        self._slots = []

    def _destinations(self) -> list[list[list[Named]]]:
        return [[worker] for worker in self._workers]

    def open_buckets(self, size: int) -> list[str]:
        """See `WeightLink`; no other process writes into them."""
        self._size, self._slots = size, []
        return []

    def bucket(self, slot: int) -> torch.Tensor:
        """See `WeightLink`."""
        if not self._slots:
            self._slots = [torch.empty(self._size, dtype=torch.uint8, device=self.device) for _ in range(SLOTS)]
        return self._slots[slot]

    def tell_plan(self, plan: FeedPlan) -> None:
        """See `WeightLink`."""
        self._regions = [bucket.regions for bucket in plan.buckets]
        super().tell_plan(plan)

    def deliver(self, number: int) -> None:
        """The call and the messages end together. If the engine is lost the messages are aborted, not waited for."""
        group = self._group
        if group is None or self._call is None:
            raise EngineLost("the NCCL group with the rollout engine is closed")

        def leave(answer: Future[Any]) -> None:
            if answer.exception() is not None:
                self.close()

        if number == 0:
            self._start()
        regions, content = self._regions[number], self.bucket(number % SLOTS)
        torch.accelerator.synchronize()  # what this rank wrote
        with ThreadPoolExecutor(1) as thread:
            sizes = [stop - start for start, stop in regions]
            answer = thread.submit(self._call, "update_weights", {"number": number, "sizes": sizes})
            answer.add_done_callback(leave)
            try:
                for worker, (start, stop) in enumerate(regions):
                    if start < stop:
                        group.send(content[start:stop], 1 + worker)
            except RuntimeError as error:
                self.close()
                answer.result()  # says more, if the engine is lost
                raise EngineLost(f"the weights did not reach the rollout engine: {error}") from None
            answer.result()
        torch.accelerator.synchronize()  # before a later bucket overwrites this one


@dataclass
class NcclBucket(NumberedBucket):
    """A bucket that comes over NCCL."""

    sizes: list[int]  #: bytes of each worker's part


class NcclEngine(InPlaceTransfer):
    """Worker half."""

    init_info_cls = NcclMeeting
    update_info_cls = NcclBucket
    _group: Communicator | None = None
    _region: torch.Tensor | None = None  # lives as long as an update does: between two of them the KV cache has the memory
    join: Join = staticmethod(join_nccl)

    def init_transfer_engine(self, init_info: NcclMeeting) -> None:
        """Join the trainer's group. Ranks of it: the trainer, then the workers in vLLM's order."""
        self._group = self.join(init_info, 1 + self.parallel_config.rank, self.device)

    def receive_weights(self, update_info: NcclBucket) -> None:
        """Receive this worker's pieces of one bucket and write them."""
        assert self._group is not None, "vLLM calls init_transfer_engine first"
        size = update_info.sizes[self.parallel_config.rank]
        if self._region is None or len(self._region) < size:
            self._region = torch.empty(size, dtype=torch.uint8, device=self.device)
        if size:
            self._group.recv(self._region[:size], 0)
        self.take_bucket(update_info.number, self._region)

    def finish_weight_update(self) -> None:
        """See `InPlaceTransfer`."""
        self._region = None
        super().finish_weight_update()

    def shutdown(self) -> None:
        """Leave the group."""
        if self._group is not None:
            self._group.destroy()
            self._group = None


def register_nccl_transfer() -> None:
    """Make the back end known to vLLM; once per process."""
    if NCCL_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(NCCL_BACKEND, NcclEngine)
