"""A machine without semaphores or shared memory is one line that names /dev/shm, for all that starts processes."""

from __future__ import annotations

import errno
import mmap
import multiprocessing.synchronize
import os
from multiprocessing import shared_memory

import pytest
import torch

from megatron_r1.config.load import load_config
from megatron_r1.curation.inspect_records import inspect_all
from megatron_r1.data.sft_encoding import encode_records
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.mcore import ask_ranks
from megatron_r1.mcore.layout import Layout
from megatron_r1.process_pools import shared_memory_problem, starting_processes
from megatron_r1.rollout.sync.memory_file import MemoryFile

ERRORS = (errno.EROFS, errno.ENOSPC, errno.EACCES, errno.ENOENT, errno.ENOSYS)


def refuse(monkeypatch, where, name, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(where, name, fail)


def encode():
    list(encode_records([("a:1", {})], None, 2))


def inspect():
    list(inspect_all([], "a", load_config(None, ["curation.workers=2"]).curation, None, 0))


def plan_layout():
    ask_ranks.shards_of_layout(None, Layout(dp=128, world_size=128))


@pytest.mark.parametrize("number", ERRORS)
@pytest.mark.parametrize(
    ("work", "named", "way_on"),
    [
        (encode, "sft.workers=2", ", or set sft.workers=0"),
        (inspect, "curation.workers=2", ", or set curation.workers=1"),
        (plan_layout, "working out what the ranks of a layout store", ""),
    ],
)
def test_without_semaphores_a_pool_is_one_line(monkeypatch, number, work, named, way_on):
    monkeypatch.setattr(ask_ranks.multiprocessing, "cpu_count", lambda: 2)
    refuse(monkeypatch, multiprocessing.synchronize._multiprocessing, "SemLock", number)
    with pytest.raises(ConfigError) as caught:
        work()
    assert caught.value.exit_code == 2
    assert str(caught.value) == (
        f"{named} cannot start processes: {os.strerror(number)}; "
        f"their semaphores are files in /dev/shm, which must be mounted, writable and not full{way_on}"
    )


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (OSError(errno.EAGAIN, "Resource temporarily unavailable"), "ulimit -u"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (NotImplementedError("no synchronize"), "no synchronize; their semaphores are files in /dev/shm"),
        (ImportError("no sem_open"), "/dev/shm"),
    ],
)
def test_other_limits_of_the_machine_are_named_as_what_they_are(error, advice):
    with pytest.raises(ConfigError) as caught, starting_processes("sft.workers=2"):
        raise error
    assert advice in str(caught.value) and ("/dev/shm" in str(caught.value)) == ("ulimit" not in advice)


def test_what_is_wrong_with_data_is_not_taken_for_it():
    with pytest.raises(DataError, match="line 3"), starting_processes("sft.workers=2"):
        raise DataError("line 3")


@pytest.mark.parametrize("number", ERRORS)
def test_an_engine_that_does_not_start_is_told_why(monkeypatch, number):
    assert shared_memory_problem() is None
    refuse(monkeypatch, shared_memory._posixshmem, "shm_open", number)
    assert shared_memory_problem() == (
        f"{os.strerror(number)}; they are files in /dev/shm, which must be mounted, writable and not full"
    )


@pytest.mark.parametrize(("where", "name"), [(os, "memfd_create"), (os, "ftruncate"), (os, "posix_fallocate"), (mmap, "mmap")])
def test_weights_without_shared_memory_are_one_line(monkeypatch, where, name):
    refuse(monkeypatch, where, name, errno.ENOSPC)
    with pytest.raises(ConfigError, match=r"no shared memory for the weights: No space left on device; .*memfd, not in /dev/shm"):
        MemoryFile(100)


def test_weights_do_not_need_dev_shm(monkeypatch):
    refuse(monkeypatch, shared_memory._posixshmem, "shm_open", errno.EROFS)
    refuse(monkeypatch, multiprocessing.synchronize._multiprocessing, "SemLock", errno.EROFS)
    file = MemoryFile(8)
    file.bytes.view(torch.float32)[1] = 2.0
    with open(file.path, "rb") as opened:
        assert torch.frombuffer(bytearray(opened.read(8)), dtype=torch.float32).tolist() == [0, 2]
    file.close()
