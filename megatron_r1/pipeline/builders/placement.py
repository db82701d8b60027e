"""Which ranks own a rollout engine, and where it runs: `rollout.placement`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.channel.announcements import Announcement, find_servers
from megatron_r1.runtime.launch import LaunchInfo, visible_gpus


@dataclass(frozen=True)
class EnginePlace:
    """Where the engine of one rank is, or its part of one that spans nodes."""

    variables: dict[str, str] = field(default_factory=dict)  #: that its process gets: which GPUs it sees
    servers: tuple[Announcement, ...] = ()  #: that hold it on other nodes, the head's first; none: it is a child of the rank
    ranks: tuple[int, ...] = ()  #: that have its parts, the head's first, where it spans the nodes of ranks


def place_engine(rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"]) -> EnginePlace | None:
    """The place of this rank's engine, None where it has none. All ranks call this.

    Engines of this node are owned by the ranks that train on their first GPU; those of servers by ranks spread over the job, so that
    the weights leave from many nodes at a time. An engine that spans nodes has those of consecutive ranks or servers.

    Raises:
        ConfigError: more engines than there is room for, or servers that are not there.
    """
    if rollout.placement == "single":
        if rollout.nodes_per_engine > 1:
            raise ConfigError(
                f"rollout.nodes_per_engine={rollout.nodes_per_engine} does not go with rollout.placement=single, one engine beside rank 0: "
                "set rollout.placement=colocated or disaggregated"
            )
        return EnginePlace() if launch.rank == 0 else None
    if rollout.placement == "colocated":
        return _colocated(rollout, launch, device)
    engines = _served_engines(rollout)
    if len(engines) > launch.world_size:
        raise ConfigError(
            f"rollout.servers={rollout.servers} has {len(engines)} engines, more than the {launch.world_size} ranks that feed them one each"
        )
    owners = {number * launch.world_size // len(engines): servers for number, servers in enumerate(engines)}
    return EnginePlace(servers=owners[launch.rank]) if launch.rank in owners else None


def _served_engines(rollout: RolloutConfig) -> list[tuple[Announcement, ...]]:
    """The servers of each engine."""
    if rollout.servers is None:
        raise ConfigError(
            "rollout.placement=disaggregated needs rollout.servers, the folder given to megatron-r1 serve-rollouts --announce"
        )
    servers = find_servers(Path(rollout.servers), rollout.start_timeout_seconds)
    if len(servers) % rollout.nodes_per_engine:
        raise ConfigError(
            f"rollout.servers={rollout.servers} has {len(servers)} servers, which rollout.nodes_per_engine={rollout.nodes_per_engine} "
            "does not divide"
        )
    return list(zip(*[iter(servers)] * rollout.nodes_per_engine, strict=True))


def _colocated(rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"]) -> EnginePlace | None:
    stride = max(1, rollout.tensor_parallel_size // rollout.nodes_per_engine) if device == "cuda" else 1
    if rollout.engines_per_node * stride > launch.local_world_size:
        raise ConfigError(
            f"rollout.engines_per_node={rollout.engines_per_node} of {stride} device(s) each do not fit beside the "
            f"{launch.local_world_size} rank(s) of a node: lower it or rollout.tensor_parallel_size"
        )
    number, first = divmod(launch.local_rank, stride)
    if first or number >= rollout.engines_per_node:
        return None
    variables = visible_gpus(launch.local_rank, stride) if device == "cuda" else {}
    return EnginePlace(variables, ranks=_ranks_of_engine(rollout.nodes_per_engine, launch) if rollout.nodes_per_engine > 1 else ())


def _ranks_of_engine(nodes: int, launch: LaunchInfo) -> tuple[int, ...]:
    """Those with the same place on consecutive nodes."""
    node, place = divmod(launch.rank, launch.local_world_size)
    all_nodes, uneven = divmod(launch.world_size, launch.local_world_size)
    if place != launch.local_rank or uneven or all_nodes % nodes:
        raise ConfigError(
            f"rollout.nodes_per_engine={nodes} needs ranks that are numbered node by node, as many on each, on a multiple of {nodes} nodes; "
            f"rank {launch.rank} of {launch.world_size} is number {launch.local_rank} of {launch.local_world_size} on its node"
        )
    first = node - node % nodes
    return tuple((first + number) * launch.local_world_size + place for number in range(nodes))
