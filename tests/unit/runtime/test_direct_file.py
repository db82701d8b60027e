"""Files written past the page cache hold every byte, in pieces of any size, whether the file system takes that or not."""

from __future__ import annotations

import errno
import os
import random

import pytest
import xxhash

from megatron_r1.runtime import direct_file
from megatron_r1.runtime.direct_file import DirectFile


@pytest.fixture(autouse=True)
def small_buffers(monkeypatch):
    monkeypatch.setattr(direct_file, "_BUFFER", 8192)
    monkeypatch.setattr(direct_file, "_free_buffers", [])


def write(path, pieces) -> DirectFile:
    file = DirectFile(path)
    for piece in pieces:
        file.write(memoryview(piece))
    file.close()
    return file


@pytest.mark.parametrize("sizes", [[], [1], [8192], [8192, 1], [4096] * 9, [100_000, 3, 8189, 8192, 50_000]])
def test_every_byte_is_written_once(tmp_path, sizes):
    rng = random.Random(0)
    pieces = [bytearray(rng.randbytes(size)) for size in sizes]
    whole = b"".join(pieces)
    file = write(tmp_path / "a", pieces)
    assert (tmp_path / "a").read_bytes() == whole
    assert file.bytes == len(whole) and file.checksum() == xxhash.xxh3_128(whole).hexdigest()


def test_bytes_may_change_after_they_were_written_and_buffers_are_used_again(tmp_path):
    data = bytearray(b"x" * 30_000)
    for name in ("a", "b"):
        file = DirectFile(tmp_path / name)
        file.write(memoryview(data))
        data[:] = b"y" * len(data)
        file.close()
    assert (tmp_path / "a").read_bytes() == b"x" * 30_000 and (tmp_path / "b").read_bytes() == b"y" * 30_000
    assert len(direct_file._free_buffers) == direct_file._NUM_BUFFERS


@pytest.mark.parametrize("refuses", ["open", "pwrite"])
def test_a_file_system_without_direct_writes(tmp_path, monkeypatch, refuses):
    real = {"open": os.open, "pwrite": os.pwrite}
    refused = []

    def open_(path, flags, mode=0o777):
        if flags & direct_file._DIRECT:
            refused.append("open")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["open"](path, flags, mode)

    def pwrite(fd, data, offset):
        if direct_file.fcntl.fcntl(fd, direct_file.fcntl.F_GETFL) & direct_file._DIRECT:
            refused.append("pwrite")
            raise OSError(errno.EINVAL, "Invalid argument")
        return real["pwrite"](fd, data, offset)

    if refuses == "open":
        monkeypatch.setattr(direct_file.os, "open", open_)
    else:
        monkeypatch.setattr(direct_file.os, "pwrite", pwrite)
    write(tmp_path / "a", [b"z" * 20_000])
    assert refuses in refused
    assert (tmp_path / "a").read_bytes() == b"z" * 20_000


def test_two_threads_may_find_out_at_once_that_direct_writes_are_refused(tmp_path, monkeypatch):
    """Before the second one looks, the first one has ended direct writing."""
    real, refused = os.pwrite, []

    def pwrite(fd, data, offset):
        flags = direct_file.fcntl.fcntl(fd, direct_file.fcntl.F_GETFL)
        if flags & direct_file._DIRECT:
            refused.append(offset)
            direct_file.fcntl.fcntl(fd, direct_file.fcntl.F_SETFL, flags & ~direct_file._DIRECT)
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd, data, offset)

    monkeypatch.setattr(direct_file.os, "pwrite", pwrite)
    write(tmp_path / "a", [b"z" * 20_000])
    assert refused and (tmp_path / "a").read_bytes() == b"z" * 20_000


def test_an_invalid_write_that_was_not_direct_is_an_error(tmp_path, monkeypatch):
    def pwrite(fd, data, offset):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(direct_file.os, "pwrite", pwrite)
    with pytest.raises(OSError, match="Invalid argument"):
        write(tmp_path / "a", [b"z" * 20_000])


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    def pwrite(fd, data, offset):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct_file.os, "pwrite", pwrite)
    file = DirectFile(tmp_path / "a")
    with pytest.raises(OSError, match="No space left"):
        for _ in range(20):
            file.write(memoryview(b"q" * 8192))
    file.discard()
    file = DirectFile(tmp_path / "b")
    file.write(memoryview(b"q"))
    with pytest.raises(OSError, match="No space left"):
        file.close()
