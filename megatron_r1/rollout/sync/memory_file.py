"""Buckets of weights in anonymous memory files, which other processes of the node map."""

from __future__ import annotations

import mmap
import os

import torch

from megatron_r1.errors import ConfigError


class MemoryFile:
    """Bytes in a file without a name on disk, so that a killed run leaves nothing.

    Raises:
        ConfigError: there is no memory for it.
    """

    def __init__(self, size: int) -> None:
        self._fd = -1
        try:
            self._fd = os.memfd_create("megatron_r1-weights")
            os.ftruncate(self._fd, size)
            os.posix_fallocate(self._fd, 0, size)  # else a write into the map dies of SIGBUS
            shared = mmap.mmap(self._fd, size)
        except OSError as error:
            self.close()
            raise ConfigError(
                f"rollout.transfer: no shared memory for the weights: {error.strerror}; it is a file in memory (memfd, not in "
                "/dev/shm): free memory, or raise the container's limit of memory or of open files"
            ) from None
        #: [bytes] uint8
        self.bytes = torch.frombuffer(shared, dtype=torch.uint8)

    @property
    def path(self) -> str:
        """Under which processes of this node open it while this process lives."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def close(self) -> None:
        """Free it, once nobody maps it. Safe to call twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
