"""Groups for engines that span nodes: every rank of a job of 512 takes part in the making of each."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.pipeline.builders.placement import place_engine
from megatron_r1.runtime import distributed, peers
from megatron_r1.runtime.device import Device
from megatron_r1.runtime.launch import LaunchInfo
from megatron_r1.runtime.peers import find_peers, groups_of_peers

CUDA = Device("cuda", torch.device("cuda", 0), "cpu:gloo,cuda:nccl")
ROLLOUT = RolloutConfig(placement="colocated", tensor_parallel_size=64, nodes_per_engine=8)


def launches(nodes: int, ranks: int) -> list[LaunchInfo]:
    return [LaunchInfo(rank, nodes * ranks, rank % ranks, ranks, "127.0.0.1", 29500, "slurm") for rank in range(nodes * ranks)]


def members(rollout: RolloutConfig, nodes: int, ranks: int) -> list[tuple[int, ...]]:
    """What each rank gives to `find_peers`."""
    places = [place_engine(rollout, replace(launch), "cpu") for launch in launches(nodes, ranks)]
    return [() if place is None else place.ranks for place in places]


@pytest.fixture
def splits(monkeypatch):
    """Collective splits of NCCL's world that this process takes part in, as torch counts them, without a GPU."""
    counts = Counter()

    class World:
        supports_splitting = True

        def perform_nocolor_split(self, _device: torch.device) -> None:
            counts["splits"] += 1

    join, make = dist.init_process_group, dist.new_group

    def join_fake(_backend: str, **arguments) -> None:
        device = arguments.pop("device_id", None)
        join("fake", **arguments)
        if device is not None:
            dist.group.WORLD.bound_device_id = device

    def make_fake(ranks: list[int], timeout, backend: str) -> dist.ProcessGroup:
        counts["groups"] += 1
        return make(ranks, timeout, backend="fake")

    monkeypatch.setattr(distributed, "open_store", lambda *_: FakeStore())
    monkeypatch.setattr(distributed, "open_waiting_place", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", join_fake)
    monkeypatch.setattr(dist, "new_group", make_fake)
    monkeypatch.setattr(distributed_c10d, "_get_split_source", lambda _group: World())
    return counts


def test_every_rank_makes_the_same_groups(monkeypatch, splits):
    """Eight engines of eight nodes in 64 nodes: 64 ranks are in a group of them, 448 are not."""
    ranks = members(ROLLOUT, 64, 8)
    assert len(groups_of_peers(ranks)) == 8 and sum(map(bool, ranks)) == 64
    seen = {}
    monkeypatch.setattr(distributed, "gather_objects", lambda value, group=None: [value])
    for launch in launches(64, 8):
        splits.clear()
        answers = iter([["10.0.0.1"] * 512, [(mine, "10.0.0.1") for mine in ranks]])
        monkeypatch.setattr(peers, "gather_objects", lambda _, answers=answers: next(answers))
        distributed.join_process_group(launch, CUDA, 7200.0)
        try:
            found = find_peers(ranks[launch.rank], "10.0.0.1")
            seen[launch.rank] = (splits["groups"], splits["splits"])
            assert (found is not None) == bool(ranks[launch.rank])
        finally:
            distributed.shutdown()
    assert len(seen) == 512 and set(seen.values()) == {(8, 0)}


@pytest.mark.parametrize("per_node", [1, 4, 8])
def test_a_group_is_the_same_for_all_its_members(per_node):
    ranks = members(replace_settings(engines_per_node=per_node), 64, 8)
    groups = groups_of_peers(ranks)
    assert len(groups) == 8 * per_node and len({rank for group in groups for rank in group}) == 64 * per_node
    with pytest.raises(ValueError, match="rank 8 is one of the peers .*, but means"):
        groups_of_peers([*ranks[:8], (), *ranks[9:]])


def replace_settings(**settings: object) -> RolloutConfig:
    return ROLLOUT.model_copy(update=settings)
