"""Cores of this process: those it is bound to, or fewer where a container limits its time."""

from __future__ import annotations

import os

import pytest

from megatron_r1.errors import ConfigError
from megatron_r1.runtime import cores, launch
from megatron_r1.runtime.cores import SharedCores, choose_threads, share_cores, usable_cores


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", None), ("50000 100000", 1), ("99000000 100000", None), ("odd", None)])
def test_a_limit_of_processor_time_counts(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores(tmp_path / "cpu.max") == (cores or len(os.sched_getaffinity(0)))
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_a_rank_alone_has_all_cores():
    assert share_cores(True) == share_cores(False) == SharedCores(usable_cores(), 1, 1)


@pytest.mark.parametrize(
    ("shared", "local_ranks", "limit", "threads", "reason"),
    [
        (SharedCores(16, 1), 1, "max 100000", 16, "1 process has 16 cores"),
        (SharedCores(16, 4), 4, "max 100000", 4, "4 processes share 16 cores"),
        (SharedCores(2, 1), 8, "max 100000", 2, "1 process has 2 cores"),  # each is bound to its own
        (SharedCores(4, 1), 8, "800000 100000", 1, "1 process has 4 cores, processor time for 8"),
        (SharedCores(2, 8), 8, "max 100000", 1, "8 processes share 2 cores"),  # never none
        (SharedCores(1, 1), 1, "50000 100000", 1, "1 process has 1 core, processor time for 1"),
    ],
)
def test_threads_are_a_ranks_part_of_its_nodes_cores(monkeypatch, tmp_path, shared, local_ranks, limit, threads, reason):
    (tmp_path / "cpu.max").write_text(limit)
    monkeypatch.setattr(cores, "share_cores", lambda uses: shared)
    monkeypatch.setattr(cores, "requested_threads", lambda: None)
    assert choose_threads(local_ranks, tmp_path / "cpu.max") == (threads, reason)
    monkeypatch.setattr(cores, "requested_threads", lambda: 3)
    assert choose_threads(local_ranks, tmp_path / "cpu.max") == (3, "OMP_NUM_THREADS=3")


@pytest.mark.parametrize(("asked", "number"), [("", None), ("4", 4), (" 4,2", 4)])
def test_the_environment_asks_for_threads(monkeypatch, asked, number):
    monkeypatch.setattr(launch, "_asked_threads", lambda: asked)
    assert launch.requested_threads() == number


@pytest.mark.parametrize("asked", ["many", "0", "-1", "1.5"])
def test_an_environment_that_asks_for_no_number_is_told(monkeypatch, asked):
    monkeypatch.setattr(launch, "_asked_threads", lambda: asked)
    with pytest.raises(ConfigError, match=f"OMP_NUM_THREADS={asked} is no number of threads"):
        launch.requested_threads()
