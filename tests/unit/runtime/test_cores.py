"""Cores of this process: those it is bound to, or fewer where a container limits its time."""

from __future__ import annotations

import os

import pytest

from megatron_r1.runtime.cores import SharedCores, share_cores, usable_cores


@pytest.mark.parametrize(("limit", "cores"), [("max 100000", None), ("50000 100000", 1), ("99000000 100000", None), ("odd", None)])
def test_a_limit_of_processor_time_counts(tmp_path, limit, cores):
    (tmp_path / "cpu.max").write_text(f"{limit}\n")
    assert usable_cores(tmp_path / "cpu.max") == (cores or len(os.sched_getaffinity(0)))
    assert usable_cores(tmp_path / "none") == len(os.sched_getaffinity(0))


def test_a_rank_alone_has_all_cores():
    assert share_cores(True) == share_cores(False) == SharedCores(usable_cores(), 1, 1)
