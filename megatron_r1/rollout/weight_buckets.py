"""Weights in buckets of tensors: the trainer's half of a transfer through a memory file or over a connection.

The workers' half is `vllm/shared_memory.py`; both halves over NCCL are in `vllm/nccl_transfer.py`.
"""

from __future__ import annotations

import mmap
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal, Protocol

import torch

from megatron_r1.errors import ConfigError

_ALIGNMENT = 16  # bytes; every dtype can be viewed at such an offset
SMALLEST_BUCKET, LARGEST_BUCKET = 64 << 20, 1 << 30
_BUCKETS = 1024  # of an update, where the two bounds allow it


def bucket_bytes(setting_mb: int | None, weight_bytes: int) -> int:
    """Size of a bucket: `rollout.bucket_mb`, or a 1,024th of the weights, between 64 MiB and 1 GiB.

    A call has a cost of its own, some 10 ms over many workers; with 1,342 GB, 20,000 buckets of 64 MiB would cost 200 s, 1,250 of 1
    GiB cost 13 s. And a call must end within `rollout.stall_seconds`: 1 GiB takes a second at 1 GB/s.
    """
    if setting_mb is not None:
        return setting_mb << 20
    return min(LARGEST_BUCKET, max(SMALLEST_BUCKET, weight_bytes // _BUCKETS))


def update_memory(transfer: Literal["shm", "nccl"], bucket: int, largest: int) -> tuple[int, int]:
    """Bytes that an update takes beside the weights: on each worker's device, and on the host of each node of the engine.

    A worker writes slices of the bucket into its parameters as it reads them. Over NCCL every worker holds a bucket on its device.
    In shared memory all workers of a node map one; a kernel's own order of an expert's matrix takes a copy of that slice on CPU.

    Args:
        bucket: `bucket_bytes`.
        largest: bytes of the largest tensor, which is not divided over buckets.
    """
    held = max(bucket, largest)
    return (held, 0) if transfer == "nccl" else (0, held)


class WeightSender(Protocol):
    """The trainer's half of a weight transfer."""

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send all weights and have the engine use them."""

    def close(self) -> None:
        """Free what the transfer holds. Safe to call twice."""


class BucketSender(ABC):
    """Packs tensors into buckets, one after the other.

    Args:
        call: calls a method of the engine by name and waits for it.
        bucket_bytes: tensors are collected up to this size; a larger tensor makes a bucket of its own.
    """

    device = torch.device("cpu")  #: on which buckets are packed

    def __init__(self, call: Callable[..., Any], bucket_bytes: int = SMALLEST_BUCKET) -> None:
        self._call = call
        self.bucket_bytes = bucket_bytes
        self._open()

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `WeightSender.send`."""
        for i, bucket in enumerate(self._pack(weights)):
            if i == 0:  # not before there is something: gathering the weights may fail
                self._call("start_weight_update")
            self._deliver(bucket)
        self._call("finish_weight_update", str(version))

    def _open(self) -> None:
        self._call("init_weight_transfer_engine", {})

    def _deliver(self, bucket: dict[str, Any]) -> None:
        """Have the engine take the bucket that was written last. One call a bucket: each ends within `rollout.stall_seconds`."""
        self._call("update_weights", bucket)

    @abstractmethod
    def close(self) -> None:
        """See `WeightSender.close`."""

    @abstractmethod
    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        """Write every tensor at its offset into `num_bytes` of memory; returns the place where the engine finds them."""

    def _pack(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        """Write bucket after bucket and yield each one's layout: the fields of `vllm.in_place.WeightBucket`."""
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in weights:
            if bucket and size + tensor.nbytes > self.bucket_bytes:
                yield self._lay_out(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().to(self.device).contiguous()))
            size += tensor.nbytes
        if bucket:
            yield self._lay_out(bucket)

    def _lay_out(self, bucket: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        offsets, end = [], 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        where = self._write([(tensor, offset) for (_, tensor), offset in zip(bucket, offsets, strict=True)], end)
        return where | {
            "num_bytes": end,
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "offsets": offsets,
        }


class SharedMemorySender(BucketSender):
    """One memory file for every bucket, for an engine on this machine. It has no name on disk, so a killed run leaves nothing."""

    def __init__(self, call: Callable[..., Any], bucket_bytes: int = SMALLEST_BUCKET) -> None:
        try:
            self._fd = os.memfd_create("megatron_r1-weights")
        except OSError as error:
            raise _no_memory(error) from None
        self._size = 0
        super().__init__(call, bucket_bytes)

    def close(self) -> None:
        """See `WeightSender.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        try:
            if num_bytes > self._size:
                os.ftruncate(self._fd, num_bytes)
                os.posix_fallocate(self._fd, self._size, num_bytes - self._size)  # else a write into the map dies of SIGBUS
                self._size = num_bytes
            mapped = mmap.mmap(self._fd, self._size)
        except OSError as error:
            raise _no_memory(error) from None
        with mapped as shared:
            copy_into_buffer(tensors, torch.frombuffer(shared, dtype=torch.uint8))
        return {"paths": [f"/proc/{os.getpid()}/fd/{self._fd}"]}


class NetworkSender(BucketSender):
    """The content of every bucket goes with the call, to a server on another node that puts it into a memory file there."""

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        content = bytearray(num_bytes)
        copy_into_buffer(tensors, torch.frombuffer(content, dtype=torch.uint8))
        return {"content": pickle.PickleBuffer(content)}  # sent as it is; the server finds a bytearray


def _no_memory(error: OSError) -> ConfigError:
    return ConfigError(
        f"rollout.transfer: no shared memory for the weights: {error.strerror}; it is a file in memory (memfd, not in /dev/shm): "
        "free memory, or raise the container's limit of memory or of open files"
    )


def copy_into_buffer(tensors: list[tuple[torch.Tensor, int]], buffer: torch.Tensor) -> None:
    """Copy every tensor to its offset in a buffer of bytes."""
    for tensor, offset in tensors:
        buffer[offset : offset + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
