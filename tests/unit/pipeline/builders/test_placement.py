"""Which ranks own a rollout engine, and on which GPUs or servers it runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.builders.placement import EnginePlace, place_engine
from megatron_r1.rollout.channel.announcements import Announcement, announce
from megatron_r1.runtime.launch import LaunchInfo


def launch(rank: int, world_size: int, local_rank: int, local_world_size: int) -> LaunchInfo:
    return LaunchInfo(rank, world_size, local_rank, local_world_size, "h", 1, "slurm")


def announce_servers(folder: Path, count: int) -> list[Announcement]:
    announcements = [Announcement(number, count, f"node{number}", 1, "6b" * 32, 1) for number in range(count)]
    for announcement in announcements:
        announce(folder, announcement)
    return announcements


def test_engines_on_servers_are_spread_over_the_ranks(tmp_path):
    announcements = announce_servers(tmp_path, 2)
    config = RolloutConfig(placement="disaggregated", servers=str(tmp_path))
    places = [place_engine(config, launch(rank, 8, rank % 4, 4), "cpu") for rank in range(8)]
    assert places == [EnginePlace(servers=(announcements[0],)), *[None] * 3, EnginePlace(servers=(announcements[1],)), *[None] * 3]
    with pytest.raises(ConfigError, match="2 engines, more than the 1 ranks"):
        place_engine(config, launch(0, 1, 0, 1), "cpu")
    with pytest.raises(ConfigError, match="needs rollout.servers"):
        place_engine(RolloutConfig(placement="disaggregated"), launch(0, 1, 0, 1), "cpu")


def test_engines_beside_the_ranks_take_the_gpus_of_a_node_in_turn(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    config = RolloutConfig(placement="colocated", tensor_parallel_size=4, engines_per_node=2)
    places = [place_engine(config, launch(8 + rank, 16, rank, 8), "cuda") for rank in range(8)]
    assert [rank for rank, place in enumerate(places) if place is not None] == [0, 4]
    assert [places[rank].variables["CUDA_VISIBLE_DEVICES"] for rank in (0, 4)] == ["0,1,2,3", "4,5,6,7"]
    on_cpu = [place_engine(RolloutConfig(placement="colocated"), launch(rank, 4, rank % 2, 2), "cpu") for rank in range(4)]
    assert [place is not None for place in on_cpu] == [True, False, True, False]
    single = [place_engine(RolloutConfig(), launch(rank, 2, rank, 2), "cuda") for rank in range(2)]
    assert single == [EnginePlace(), None]
    too_many = RolloutConfig(placement="colocated", tensor_parallel_size=8, engines_per_node=2)
    with pytest.raises(ConfigError, match="do not fit beside the 8"):
        place_engine(too_many, launch(0, 8, 0, 8), "cuda")


def test_an_engine_over_nodes_has_the_same_place_on_consecutive_ones(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    config = RolloutConfig(placement="colocated", tensor_parallel_size=8, nodes_per_engine=2, engines_per_node=2)
    places = [place_engine(config, launch(rank, 32, rank % 8, 8), "cuda") for rank in range(32)]
    assert {rank: place.ranks for rank, place in enumerate(places) if place is not None} == {
        0: (0, 8), 8: (0, 8), 4: (4, 12), 12: (4, 12), 16: (16, 24), 24: (16, 24), 20: (20, 28), 28: (20, 28),
    }  # fmt: skip
    assert places[12].variables["CUDA_VISIBLE_DEVICES"] == "4,5,6,7"
    with pytest.raises(ConfigError, match="numbered node by node, .* multiple of 2 nodes; rank 0 of 24 is number 0 of 8"):
        place_engine(config, launch(0, 24, 0, 8), "cuda")
    with pytest.raises(ConfigError, match="rank 1 of 16 is number 0 of 8"):
        place_engine(config, launch(1, 16, 0, 8), "cuda")
    with pytest.raises(ConfigError, match="does not go with rollout.placement=single"):
        place_engine(RolloutConfig(tensor_parallel_size=2, nodes_per_engine=2), launch(1, 2, 1, 2), "cpu")
    announcements = announce_servers(tmp_path, 4)
    config = RolloutConfig(placement="disaggregated", servers=str(tmp_path), tensor_parallel_size=2, nodes_per_engine=2)
    places = [place_engine(config, launch(rank, 4, rank, 4), "cpu") for rank in range(4)]
    assert places == [EnginePlace(servers=tuple(announcements[:2])), None, EnginePlace(servers=tuple(announcements[2:])), None]
    with pytest.raises(ConfigError, match="has 4 servers, which rollout.nodes_per_engine=3 does not divide"):
        place_engine(config.model_copy(update={"nodes_per_engine": 3}), launch(0, 4, 0, 4), "cpu")
