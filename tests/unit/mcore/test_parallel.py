"""Megatron-Core's groups: every rank makes all of them, with the one timeout, and as many members as the limits are counted for."""

from __future__ import annotations

import datetime

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.mcore import host

host.activate("cpu")

from megatron.core import parallel_state

from megatron_r1.mcore import meta, parallel
from megatron_r1.mcore.layout import Layout, group_sizes
from megatron_r1.runtime import distributed

LAYOUTS = [
    Layout(tp=8, pp=16, ep=32, dp=4, world_size=512),
    Layout(tp=2, pp=2, cp=2, ep=4, etp=1, dp=2, world_size=16),
    Layout(dp=8, world_size=8),
]


def made_by(layout: Layout, rank: int, monkeypatch) -> list[tuple[tuple[int, ...], datetime.timedelta]]:
    """Members and timeout of every group that the rank makes, its own or not."""
    made = []
    with meta._quick_start(), monkeypatch.context() as patch:
        create_group = parallel_state.create_group

        def create(ranks: list[int], *arguments, **options):
            made.append((tuple(ranks), options["timeout"]))
            return create_group(ranks, *arguments, **options)

        patch.setattr(parallel_state, "create_group", create)
        dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=layout.world_size)
        try:
            parallel.build_process_groups(layout, seed=0)
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
    return made


def test_all_ranks_make_all_groups_with_one_timeout(monkeypatch):
    monkeypatch.setattr(distributed, "_timeout", datetime.timedelta(seconds=4321))
    for layout in LAYOUTS:
        ranks = (0, layout.world_size // 2, layout.world_size - 1)
        first, *others = (made_by(layout, rank, monkeypatch) for rank in ranks)
        assert all(other == first for other in others)
        assert {timeout for _, timeout in first} == {datetime.timedelta(seconds=4321)}
        of_first = [len(members) for members, _ in first if 0 in members]
        assert sorted(of_first) == sorted(group_sizes(layout))
