"""Weight transfer over NCCL in buckets, both halves, on vLLM's communicator. For CUDA.

Every bucket is one call to the engine beside one broadcast of its bytes. vLLM's own nccl back end sends all weights within one
call, which at 1,342 GB gives no sign of life for minutes, and loads them by the layerwise reload (see `in_place.py`). This has not
been run: no GPU was at hand; tests play the communicator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.vllm.in_place import InPlaceTransfer, WeightBucket
from megatron_r1.rollout.weight_buckets import BucketSender, copy_into_buffer
from megatron_r1.runtime.launch import free_port

NCCL_BACKEND = "nccl_buckets"


class Communicator(Protocol):
    """What is needed of vLLM's `PyNcclCommunicator`."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Send the tensor from rank `src`, or receive into it; enqueued on the current stream."""

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


class NcclSender(BucketSender):
    """The trainer's half.

    Args:
        call: calls a method of the engine by name and waits for it.
        bucket_bytes: see `BucketSender`.
        address: under which the workers reach this process.
        workers: of the engine.
        timeout_seconds: for the meeting.
        device: on which buckets are packed.
        join: see `join_nccl`.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        bucket_bytes: int,
        address: str,
        workers: int,
        timeout_seconds: float,
        device: torch.device,
        join: Join = join_nccl,
    ) -> None:
        self.device = device
        self._group: Communicator | None = None
        self._packed = torch.empty(0, dtype=torch.uint8, device=device)
        self._meeting = NcclMeeting(address, free_port(""), 1 + workers, timeout_seconds)
        self._join = join
        super().__init__(call, bucket_bytes)

    def close(self) -> None:
        """See `WeightSender.close`."""
        group, self._group = self._group, None
        if group is not None:
            group.destroy()

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `WeightSender.send`."""
        try:
            super().send(weights, version)
        finally:
            self._packed = self._packed[:0].clone()  # training needs the memory

    def _open(self) -> None:
        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._call, "init_weight_transfer_engine", vars(self._meeting))
            self._group = self._join(self._meeting, 0, self.device)
            answer.result()

    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        if len(self._packed) < num_bytes:
            self._packed = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        copy_into_buffer(tensors, self._packed)
        return {}

    def _deliver(self, bucket: dict[str, Any]) -> None:
        """The call and the broadcast end together. If the engine is lost the broadcast is aborted, not waited for."""
        group = self._group
        if group is None:
            raise EngineLost("the NCCL group with the rollout engine is closed")

        def leave(answer: Future[Any]) -> None:
            if answer.exception() is not None:
                self.close()

        with ThreadPoolExecutor(1) as thread:
            answer = thread.submit(self._call, "update_weights", bucket)
            answer.add_done_callback(leave)
            try:
                group.broadcast(self._packed[: bucket["num_bytes"]], 0)
            except RuntimeError as error:
                self.close()
                answer.result()  # says more, if the engine is lost
                raise EngineLost(f"the weights did not reach the rollout engine: {error}") from None
            answer.result()
        torch.accelerator.synchronize()  # before the next bucket overwrites this one


class NcclEngine(InPlaceTransfer):
    """Worker half."""

    init_info_cls = NcclMeeting
    _group: Communicator | None = None
    _packed: torch.Tensor | None = None  # lives as long as an update does: between two of them the KV cache has the memory
    join: Join = staticmethod(join_nccl)

    def init_transfer_engine(self, init_info: NcclMeeting) -> None:
        """Join the trainer's group. Ranks of it: the trainer, then the workers in vLLM's order."""
        self._group = self.join(init_info, 1 + self.parallel_config.rank, self.device)

    def receive_weights(self, update_info: WeightBucket) -> None:
        """Receive one bucket and write this worker's slices of it."""
        assert self._group is not None, "vLLM calls init_transfer_engine first"
        if self._packed is None or len(self._packed) < update_info.num_bytes:
            self._packed = torch.empty(update_info.num_bytes, dtype=torch.uint8, device=self.device)
        self._group.broadcast(self._packed[: update_info.num_bytes], 0)
        self.write(update_info.tensors(self._packed))

    def finish_weight_update(self) -> None:
        """See `InPlaceTransfer`."""
        self._packed = None
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
