"""Weight transfer through shared memory, as a back end of vLLM's own weight-transfer API.

A rank on the engine's node writes buckets of tensors into an anonymous memory file and names the layout. The workers of that node
take their slices out of it. vLLM ships nccl and ipc back ends for CUDA and none for CPU; this one serves both.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferInitInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_r1.rollout.vllm.in_place import InPlaceTransfer, WeightBucket

SHM_BACKEND = "shm"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryBucket(WeightBucket):
    """A bucket in the memory of the engine's nodes."""

    paths: list[str]  #: on each of the engine's nodes, the file that holds the bucket there


class SharedMemoryEngine(InPlaceTransfer):
    """Worker half of the transfer."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryBucket

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to open."""

    def receive_weights(self, update_info: SharedMemoryBucket) -> None:
        """Write this worker's slices of one bucket, read where the trainer put them: all workers of a node map the same memory."""
        path = update_info.paths[self.parallel_config.node_rank]
        # The trainer overwrites the file with the next bucket, but not before every worker has answered for this one. ACCESS_COPY
        # copies what is written to, which is nothing; torch takes no buffer that cannot be. The map ends with the last tensor.
        with open(path, "rb") as file:
            shared = mmap.mmap(file.fileno(), update_info.num_bytes, access=mmap.ACCESS_COPY)
        self.write(update_info.tensors(torch.frombuffer(shared, dtype=torch.uint8)))

    def shutdown(self) -> None:
        """Nothing to close."""


def register_transfer() -> None:
    """Make the back end known to vLLM; once per process."""
    if SHM_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHM_BACKEND, SharedMemoryEngine)
