"""Weights in buckets of tensors, through a memory file or over a connection: the trainer's half of `vllm/shared_memory.py`."""

from __future__ import annotations

import mmap
import os
import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

from megatron_r1.errors import ConfigError

_ALIGNMENT = 16  # bytes; every dtype can be viewed at such an offset


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

    def __init__(self, call: Callable[..., Any], bucket_bytes: int = 64 << 20) -> None:
        self._call = call
        self.bucket_bytes = bucket_bytes
        call("init_weight_transfer_engine", {})

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `WeightSender.send`."""
        for i, bucket in enumerate(self._pack(weights)):
            if i == 0:  # not before there is something: gathering the weights may fail
                self._call("start_weight_update")
            self._call("update_weights", bucket)
        self._call("finish_weight_update", str(version))

    @abstractmethod
    def close(self) -> None:
        """See `WeightSender.close`."""

    @abstractmethod
    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        """Write every tensor at its offset into `num_bytes` of memory; returns the place where the engine finds them."""

    def _pack(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        """Write bucket after bucket and yield each one's layout: the fields of `vllm.shared_memory.SharedMemoryBucket`."""
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in weights:
            if bucket and size + tensor.nbytes > self.bucket_bytes:
                yield self._lay_out(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().to("cpu").contiguous()))
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

    def __init__(self, call: Callable[..., Any], bucket_bytes: int = 64 << 20) -> None:
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
            _copy_into_bucket(tensors, memoryview(shared))
        return {"paths": [f"/proc/{os.getpid()}/fd/{self._fd}"]}


class NetworkSender(BucketSender):
    """The content of every bucket goes with the call, to a server on another node that puts it into a memory file there."""

    def close(self) -> None:
        """Nothing is held."""

    def _write(self, tensors: list[tuple[torch.Tensor, int]], num_bytes: int) -> dict[str, Any]:
        content = bytearray(num_bytes)
        _copy_into_bucket(tensors, memoryview(content))
        return {"content": pickle.PickleBuffer(content)}  # sent as it is; the server finds a bytearray


def _no_memory(error: OSError) -> ConfigError:
    return ConfigError(
        f"rollout.transfer: no shared memory for the weights: {error.strerror}; it is a file in memory (memfd, not in /dev/shm): "
        "free memory, or raise the container's limit of memory or of open files"
    )


def _copy_into_bucket(tensors: list[tuple[torch.Tensor, int]], target: memoryview) -> None:
    with target:
        for tensor, offset in tensors:
            target[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data
