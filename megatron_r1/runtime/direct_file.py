"""A large file, written from beginning to end past the page cache.

The cache would only do harm: nobody reads the file soon, each byte would be copied once more (once memory is full, at a tenth of
the disk's speed or less), and the cached files of other programs would be pushed out. So bytes are collected in aligned buffers,
which threads hand to the disk (open(2), O_DIRECT) while the caller goes on. A file system without O_DIRECT is written through
the cache.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from megatron_r1.runtime.files import new_checksum

_BUFFER = 4 << 20  # bytes; a multiple of every disk's block
_WRITERS = 2  # so that the disk always has the next buffer
_NUM_BUFFERS = _WRITERS + 2  # one being filled, one waiting
_ALIGNMENT = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_free_buffers: list[mmap.mmap] = []  # of closed files: fresh memory costs as much as copying into it


class DirectFile:
    """A file that replaces one of the same name. An error of the disk may only be raised by a later call. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.bytes = 0  #: written so far
        self._checksum = new_checksum()
        self._fd = _open_direct(path)
        self._buffers = [_take_buffer() for _ in range(_NUM_BUFFERS)]
        self._writing: list[Future | None] = [None] * _NUM_BUFFERS
        self._threads = ThreadPoolExecutor(_WRITERS)

    def write(self, data: memoryview) -> None:
        """Append bytes, which may be changed after the call. Raises OSError."""
        source = np.frombuffer(data, dtype=np.uint8)
        while len(source):
            number, start = divmod(self.bytes, _BUFFER)
            if start == 0:
                self._wait(number % _NUM_BUFFERS)
            buffer = np.frombuffer(self._buffers[number % _NUM_BUFFERS], dtype=np.uint8)
            count = min(len(source), _BUFFER - start)
            np.copyto(buffer[start : start + count], source[:count])
            self._checksum.update(buffer[start : start + count].data)
            source, self.bytes = source[count:], self.bytes + count
            if start + count == _BUFFER:
                self._submit(number, _BUFFER)

    def close(self) -> None:
        """Wait until everything is on disk. Raises OSError."""
        try:
            number, rest = divmod(self.bytes, _BUFFER)
            if rest:
                self._submit(number, rest)
            for i in range(_NUM_BUFFERS):
                self._wait(i)
            os.ftruncate(self._fd, self.bytes)  # the last block was filled up
            os.fsync(self._fd)
        finally:
            self.discard()

    def discard(self) -> None:
        """Stop writing; without effect after `close`."""
        self._threads.shutdown(cancel_futures=True)
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
            _free_buffers.extend(self._buffers)

    def checksum(self) -> str:
        """The checksum of all that was written, as `files.file_checksum` computes it. Call it after `close`."""
        return self._checksum.hexdigest()

    def _submit(self, number: int, count: int) -> None:
        i = number % _NUM_BUFFERS
        self._writing[i] = self._threads.submit(self._put, memoryview(self._buffers[i]), count, number * _BUFFER)

    def _wait(self, i: int) -> None:
        future, self._writing[i] = self._writing[i], None
        if future is not None:
            future.result()

    def _put(self, buffer: memoryview, count: int, offset: int) -> None:
        rest = buffer[: -(-count // _ALIGNMENT) * _ALIGNMENT]
        while rest:
            flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)  # before the write: the other thread may end direct writing meanwhile
            try:
                done = os.pwrite(self._fd, rest, offset)
            except OSError as error:
                if error.errno != errno.EINVAL or not flags & _DIRECT:
                    raise
                fcntl.fcntl(self._fd, fcntl.F_SETFL, flags & ~_DIRECT)
                continue
            rest, offset = rest[done:], offset + done


def _take_buffer() -> mmap.mmap:
    try:
        return _free_buffers.pop()
    except IndexError:
        return mmap.mmap(-1, _BUFFER)  # begins at a page


def _open_direct(path: Path) -> int:
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_CLOEXEC
    try:
        return os.open(path, flags | _DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags, 0o666)
