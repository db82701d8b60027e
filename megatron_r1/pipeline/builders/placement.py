"""Which ranks own a rollout engine, and where it runs: `rollout.placement`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.channel.announcements import Announcement, find_servers
from megatron_r1.rollout.options import start_limit
from megatron_r1.runtime.launch import LaunchInfo, visible_gpus


@dataclass(frozen=True)
class EnginePlace:
    """Where the engine of one rank runs, or its part of an engine that spans nodes."""

    variables: dict[str, str] = field(default_factory=dict)  #: environment of the engine's process: the GPUs that it sees
    servers: tuple[
        Announcement, ...
    ] = ()  #: servers that hold it on other nodes, the head's first; empty: the engine is a child process of the rank
    ranks: tuple[int, ...] = ()  #: ranks that hold its parts, the head's first, if it spans the nodes of several ranks

    def has_head(self, rank: int) -> bool:
        """Whether this rank samples with the engine; the others that hold parts of it only pass weights on."""
        return not self.ranks or self.ranks[0] == rank


def place_engine(
    rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"], environment: Mapping[str, str] | None = None
) -> EnginePlace | None:
    """The place of this rank's engine; None if it has none. All ranks call this.

    The rank that trains on an engine's first GPU owns it. Engines on servers are owned by ranks spread over the job, so that
    weights leave from many nodes at a time. An engine that spans nodes spans those of consecutive ranks or servers.

    Args:
        environment: of the rank, which says what GPUs it sees; None: that of this process.

    Raises:
        ConfigError: there is no room for so many engines, or servers are missing.
    """
    if rollout.placement == "single":
        if rollout.nodes_per_engine > 1:
            raise ConfigError(
                f"rollout.nodes_per_engine={rollout.nodes_per_engine} does not go with rollout.placement=single, one engine beside "
                "rank 0: set rollout.placement=colocated or disaggregated"
            )
        return EnginePlace() if launch.rank == 0 else None
    if rollout.placement == "colocated":
        return _colocated(rollout, launch, device, environment)
    engines = _served_engines(rollout)
    if len(engines) > launch.world_size:
        raise ConfigError(
            f"rollout.servers={rollout.servers} has {len(engines)} engines, more than the {launch.world_size} ranks that feed them "
            "one each"
        )
    owners = {number * launch.world_size // len(engines): servers for number, servers in enumerate(engines)}
    return EnginePlace(servers=owners[launch.rank]) if launch.rank in owners else None


def _served_engines(rollout: RolloutConfig) -> list[tuple[Announcement, ...]]:
    """The servers of each engine, those of one engine together."""
    servers = find_servers(servers_folder(rollout), start_limit(rollout.start_timeout_seconds))
    if len(servers) % rollout.nodes_per_engine:
        raise ConfigError(
            f"rollout.servers={rollout.servers} has {len(servers)} servers, which "
            f"rollout.nodes_per_engine={rollout.nodes_per_engine} does not divide"
        )
    return list(zip(*[iter(servers)] * rollout.nodes_per_engine, strict=True))


def servers_folder(rollout: RolloutConfig) -> Path:
    """Where the servers of `rollout.placement=disaggregated` are announced. Raises ConfigError if it is not said."""
    if rollout.servers is None:
        raise ConfigError(
            "rollout.placement=disaggregated needs rollout.servers, the folder given to megatron-r1 serve-rollouts --announce"
        )
    return Path(rollout.servers)


def _colocated(
    rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"], environment: Mapping[str, str] | None
) -> EnginePlace | None:
    stride = max(1, rollout.tensor_parallel_size // rollout.nodes_per_engine) if device == "cuda" else 1
    if rollout.engines_per_node * stride > launch.local_world_size:
        raise ConfigError(
            f"rollout.engines_per_node={rollout.engines_per_node} of {stride} device(s) each do not fit beside the "
            f"{launch.local_world_size} rank(s) of a node: lower it or rollout.tensor_parallel_size"
        )
    number, first = divmod(launch.local_rank, stride)
    if first or number >= rollout.engines_per_node:
        return None
    seen = {} if environment is None else {"environment": environment}
    variables = visible_gpus(launch.local_rank, stride, **seen) if device == "cuda" else {}
    return EnginePlace(variables, ranks=_ranks_of_engine(rollout.nodes_per_engine, launch) if rollout.nodes_per_engine > 1 else ())


def _ranks_of_engine(nodes: int, launch: LaunchInfo) -> tuple[int, ...]:
    """The ranks with the same number on consecutive nodes."""
    node, place = divmod(launch.rank, launch.local_world_size)
    all_nodes, uneven = divmod(launch.world_size, launch.local_world_size)
    if place != launch.local_rank or uneven or all_nodes % nodes:
        raise ConfigError(
            f"rollout.nodes_per_engine={nodes} needs ranks that are numbered node by node, as many on each, on a multiple of "
            f"{nodes} nodes; "
            f"rank {launch.rank} of {launch.world_size} is number {launch.local_rank} of {launch.local_world_size} on its node"
        )
    first = node - node % nodes
    return tuple((first + number) * launch.local_world_size + place for number in range(nodes))
