"""Weight transfer on one machine: buckets of tensors in an anonymous memory file. The trainer's half of `vllm_transfer`."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import torch

_ALIGNMENT = 16  # bytes; every dtype can be viewed at such an offset


class WeightSender(Protocol):
    """The trainer's half of a weight transfer."""

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Send all weights and have the engine use them."""

    def close(self) -> None:
        """Free what the transfer holds. Safe to call twice."""


class SharedMemorySender:
    """One memory file, reused for every bucket. It has no name on disk, so a killed run leaves nothing behind.

    Args:
        call: calls a method of the engine by name and waits for it.
        bucket_bytes: tensors are collected up to this size; a larger tensor makes a bucket of its own.
    """

    def __init__(self, call: Callable[..., Any], bucket_bytes: int = 64 << 20) -> None:
        self._call = call
        self.bucket_bytes = bucket_bytes
        self._fd = os.memfd_create("megatron_r1-weights")
        self._size = 0
        call("init_weight_transfer_engine", {})

    def send(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """See `WeightSender.send`."""
        for i, bucket in enumerate(self._pack(weights)):
            if i == 0:  # not before there is something: gathering the weights may fail
                self._call("start_weight_update")
            self._call("update_weights", bucket)
        self._call("finish_weight_update", str(version))

    def _pack(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[dict[str, Any]]:
        """Write bucket after bucket and yield each one's layout: the fields of `vllm_transfer.SharedMemoryBucket`."""
        bucket: list[tuple[str, torch.Tensor]] = []
        size = 0
        for name, tensor in weights:
            if bucket and size + tensor.nbytes > self.bucket_bytes:
                yield self._write(bucket)
                bucket, size = [], 0
            bucket.append((name, tensor.detach().to("cpu").contiguous()))
            size += tensor.nbytes
        if bucket:
            yield self._write(bucket)

    def close(self) -> None:
        """See `WeightSender.close`."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, bucket: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
        offsets, end = [], 0
        for _, tensor in bucket:
            offsets.append(end)
            end += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if end > self._size:
            os.ftruncate(self._fd, end)
            self._size = end
        with mmap.mmap(self._fd, self._size) as shared:
            for (_, tensor), offset in zip(bucket, offsets, strict=True):
                shared[offset : offset + tensor.nbytes] = tensor.reshape(-1).view(torch.uint8).numpy().data
        return {
            "path": f"/proc/{os.getpid()}/fd/{self._fd}",
            "num_bytes": end,
            "names": [name for name, _ in bucket],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket],
            "shapes": [list(tensor.shape) for _, tensor in bucket],
            "offsets": offsets,
        }
