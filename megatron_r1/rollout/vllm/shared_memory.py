"""Weight transfer through shared memory, as a back end of vLLM's own weight-transfer API.

The ranks of a trainer write buckets into anonymous memory files on the engine's node. The workers of that node take their pieces
out of them. vLLM ships nccl and ipc back ends for CUDA and none for CPU; this one serves both.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_r1.rollout.sync.transfer import map_file
from megatron_r1.rollout.vllm.in_place import InPlaceTransfer, NumberedBucket

SHM_BACKEND = "shm"


@dataclass
class SharedMemoryBucket(NumberedBucket):
    """A bucket in the memory of the engine's nodes."""

    paths: list[str]  #: on each of the engine's nodes, the file that holds the bucket there


class SharedMemoryEngine(InPlaceTransfer):
    """Worker half of the transfer."""

    update_info_cls = SharedMemoryBucket

    def receive_weights(self, update_info: SharedMemoryBucket) -> None:
        """Write this worker's pieces of one bucket, read where the trainer put them: all workers of a node map the same memory.

        The trainer overwrites a file with a later bucket, but not before every worker has answered for this one.
        """
        self.take_bucket(update_info.number, self._mapped(update_info.paths[self.parallel_config.node_rank]))

    def _mapped(self, path: str) -> torch.Tensor:
        """The bytes of a file. It stays mapped: to map it anew for every bucket costs as much as to copy the bucket."""
        known = os.stat(path)
        key = (known.st_dev, known.st_ino, known.st_size)
        maps = self.__dict__.setdefault("_maps", {})
        if key not in maps:
            if len(maps) >= _MOST_MAPS:
                maps.clear()  # of an earlier plan
            maps[key] = map_file(path)
        return maps[key]


_MOST_MAPS = 2  #: files that are mapped at a time: one that is read, one that is written


def register_transfer() -> None:
    """Make the back end known to vLLM; once per process."""
    if SHM_BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(SHM_BACKEND, SharedMemoryEngine)
