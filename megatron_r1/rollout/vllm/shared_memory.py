"""Weight transfer through shared memory, as a back end of vLLM's own weight-transfer API.

A rank on the engine's node writes buckets of tensors into an anonymous memory file and names the layout. The workers of that node
copy each bucket out and hand it to vLLM's layerwise reload. vLLM ships nccl and ipc back ends for CUDA and none for CPU; this one
serves both.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

SHM_BACKEND = "shm"


@dataclass
class SharedMemoryInit(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class SharedMemoryBucket(WeightTransferUpdateInfo):
    """The places of the tensors of one bucket."""

    paths: list[str]  #: on each of the engine's nodes, the file that holds the bucket there
    num_bytes: int  #: used part of the file
    names: list[str]  #: Hugging Face names
    dtype_names: list[str]  #: as in `torch.float32`, without "torch."
    shapes: list[list[int]]
    offsets: list[int]  #: first byte of each tensor


class SharedMemoryEngine(WeightTransferEngine):
    """Worker half of the transfer."""

    init_info_cls = SharedMemoryInit
    update_info_cls = SharedMemoryBucket

    def init_transfer_engine(self, init_info: SharedMemoryInit) -> None:
        """Nothing to open."""

    def start_weight_update(self) -> None:
        """Begin vLLM's layerwise reload."""
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: SharedMemoryBucket) -> None:
        """Load one bucket."""
        # A copy of its own for every bucket: the reload keeps references until a module is complete, and the trainer
        # overwrites the file with the next bucket.
        path = update_info.paths[self.parallel_config.node_rank]
        with open(path, "rb") as file, mmap.mmap(file.fileno(), update_info.num_bytes, prot=mmap.PROT_READ) as shared:
            buffer = torch.frombuffer(bytearray(shared), dtype=torch.uint8)
        with disable_mtp_completeness_check():
            self.model.load_weights(_tensors(buffer, update_info))

    def finish_weight_update(self) -> None:
        """Process what is still pending and refresh MLA's absorbed weights."""
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        """Nothing to close."""


def register_transfer() -> None:
    """Make the back end known to vLLM; once per process."""
    if SHM_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHM_BACKEND, SharedMemoryEngine)


def _tensors(buffer: torch.Tensor, bucket: SharedMemoryBucket) -> Iterator[tuple[str, torch.Tensor]]:
    for name, dtype_name, shape, offset in zip(bucket.names, bucket.dtype_names, bucket.shapes, bucket.offsets, strict=True):
        dtype = getattr(torch, dtype_name)
        num_bytes = dtype.itemsize * torch.Size(shape).numel()
        yield name, buffer[offset : offset + num_bytes].view(dtype).view(shape)
