"""Which ranks own a rollout engine, and where it runs: `rollout.placement`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from megatron_r1.config.schema import RolloutConfig
from megatron_r1.errors import ConfigError
from megatron_r1.rollout.announcements import Announcement, find_servers
from megatron_r1.runtime.launch import LaunchInfo, visible_gpus


@dataclass(frozen=True)
class EnginePlace:
    """Where the engine of one rank is."""

    variables: dict[str, str] = field(default_factory=dict)  #: that its process gets: which GPUs it sees
    server: Announcement | None = None  #: that holds it on another node; None: it is a child of the rank


def place_engine(rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"]) -> EnginePlace | None:
    """The place of this rank's engine, None where it owns none. All ranks call this.

    Engines of this node are owned by the ranks that train on their first GPU; those of servers by ranks spread over the job, so that
    the weights leave from many nodes at a time.

    Raises:
        ConfigError: more engines than there is room for, or servers that are not there.
    """
    if rollout.placement == "single":
        return EnginePlace() if launch.rank == 0 else None
    if rollout.placement == "colocated":
        return _colocated(rollout, launch, device)
    if rollout.servers is None:
        raise ConfigError(
            "rollout.placement=disaggregated needs rollout.servers, the folder given to megatron-r1 serve-rollouts --announce"
        )
    servers = find_servers(Path(rollout.servers), rollout.start_timeout_seconds)
    if len(servers) > launch.world_size:
        raise ConfigError(
            f"rollout.servers={rollout.servers} has {len(servers)} engines, more than the {launch.world_size} ranks that feed them one each"
        )
    owners = {number * launch.world_size // len(servers): server for number, server in enumerate(servers)}
    return EnginePlace(server=owners[launch.rank]) if launch.rank in owners else None


def _colocated(rollout: RolloutConfig, launch: LaunchInfo, device: Literal["cpu", "cuda"]) -> EnginePlace | None:
    stride = rollout.tensor_parallel_size if device == "cuda" else 1
    if rollout.engines_per_node * stride > launch.local_world_size:
        raise ConfigError(
            f"rollout.engines_per_node={rollout.engines_per_node} of {stride} device(s) each do not fit beside the "
            f"{launch.local_world_size} rank(s) of a node: lower it or rollout.tensor_parallel_size"
        )
    number, first = divmod(launch.local_rank, stride)
    if first or number >= rollout.engines_per_node:
        return None
    return EnginePlace(visible_gpus(launch.local_rank, stride) if device == "cuda" else {})
