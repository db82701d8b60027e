"""The ranks of a job that is not there: how a launcher would number them, and where each of them and each engine would be."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.pipeline.builders.placement import EnginePlace, place_engine, servers_folder
from megatron_r1.runtime.launch import LaunchInfo


@dataclass(frozen=True)
class Cluster:
    """A job of `world_size` ranks, `per_node` on each node but the last, which has the rest."""

    world_size: int
    per_node: int

    @property
    def nodes(self) -> int:
        """Number of nodes."""
        return -(-self.world_size // self.per_node)

    def launch(self, rank: int) -> LaunchInfo:
        """What the launcher would tell a rank."""
        node, local = divmod(rank, self.per_node)
        here = min(self.per_node, self.world_size - node * self.per_node)
        return LaunchInfo(rank, self.world_size, local, here, "127.0.0.1", 1, "slurm")

    def nodes_of(self, ranks: Iterable[int]) -> list[int]:
        """The nodes of these ranks."""
        return sorted({rank // self.per_node for rank in ranks})


@dataclass(frozen=True)
class RankPlace:
    """One rank: its position on every axis of the layout, and what it holds."""

    rank: int
    node: int
    positions: dict[str, int]  #: axis -> position in the rank's group
    layers: list[list[int]]  #: decoder layers, one list a virtual pipeline stage


def place_ranks(cluster: Cluster, layout: Layout, groups: dict[str, list[list[int]]], num_layers: int) -> list[RankPlace]:
    """Every rank of the layout.

    Args:
        groups: from `mcore.rank_groups`.
        num_layers: decoder layers of the model.
    """
    positions: list[dict[str, int]] = [{} for _ in range(cluster.world_size)]
    for axis, of_axis in groups.items():
        for group in of_axis:
            for position, rank in enumerate(group):
                positions[rank][axis] = position
    counts = layout.decoder_layers(num_layers)
    starts = [sum(counts[:stage]) for stage in range(len(counts))]
    layers = [list(range(start, start + count)) for start, count in zip(starts, counts, strict=True)]
    return [
        RankPlace(rank, rank // cluster.per_node, positions[rank], layers[positions[rank]["pp"] :: layout.pp])
        for rank in range(cluster.world_size)
    ]


def place_engines(cluster: Cluster, rollout: RolloutConfig, device: Literal["cpu", "cuda"]) -> list[EnginePlace | None] | None:
    """The engine of every rank, or its part of one; None: engines are on servers, which nobody looks for here.

    Raises:
        ConfigError: there is no room for the engines, or they would span other nodes than there are.
    """
    on_node = rollout.tensor_parallel_size // rollout.nodes_per_engine
    if device == "cuda" and on_node > cluster.per_node:
        raise ConfigError(
            f"rollout.tensor_parallel_size={rollout.tensor_parallel_size} on rollout.nodes_per_engine={rollout.nodes_per_engine} "
            f"node(s) needs {on_node} GPUs of a node, which has {cluster.per_node}: lower it, or raise rollout.nodes_per_engine"
        )
    if rollout.placement == "disaggregated":
        servers_folder(rollout)
        return None
    return [place_engine(rollout, cluster.launch(rank), device, {}) for rank in range(cluster.world_size)]


def shorten(numbers: Sequence[int]) -> str:
    """Numbers in few characters: "0-7" if they are neighbours, "0, 32, ... 480" if they are as far apart."""
    if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1:
        return f"{numbers[0]}-{numbers[-1]}"
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers)) or "none"
    return f"{numbers[0]}, {numbers[1]}, ... {numbers[-1]}"
