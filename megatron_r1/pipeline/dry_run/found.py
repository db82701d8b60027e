"""What a dry run is asked, and what it finds: a job on a cluster, with its model, layout and engines."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

from megatron_r1.config.schema import Config
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.pipeline.builders.placement import EnginePlace
from megatron_r1.pipeline.dry_run.cluster import Cluster, RankPlace
from megatron_r1.rollout.options import EngineOptions

Rows = list[tuple[str, str]]  #: a label, "" if it is that of the row before, and what is said


@dataclass(frozen=True)
class DryRun:
    """What is asked about. What is not given follows from the settings."""

    world_size: int | None = None  #: ranks; None: as few as the layout needs
    gpus_per_node: int = 8  #: and so ranks of a node
    mean_tokens: int | None = None  #: of a response or a sample; None: a quarter of its limit
    table: Path | None = None  #: takes a line for every rank, tab-separated
    gpu: str | None = None  #: a device of `plan.devices`; None: H800, the paper's
    is_measured: bool = False  #: whether engines beside the same ranks sample the model afterwards, as in a recipe

    def mean_of(self, limit: int) -> int:
        """Tokens of a mean response or sample. Raises ConfigError if it were longer than the longest."""
        if self.mean_tokens is not None and self.mean_tokens > limit:
            raise ConfigError(f"--mean-tokens {self.mean_tokens} is more than the limit of {limit} tokens")
        return self.mean_tokens or max(1, limit // 4)


@dataclass(frozen=True)
class Engines:
    """The rollout engines of a stage."""

    options: EngineOptions  #: what each is started with
    places: list[EnginePlace | None] | None  #: of every rank; None: engines are on servers, which nobody has looked for

    @cached_property
    def heads(self) -> list[int]:
        """The ranks that own an engine, or the first part of one that spans nodes."""
        places = enumerate(self.places or [])
        return [rank for rank, place in places if place is not None and (not place.ranks or place.ranks[0] == rank)]

    def of_rank(self, rank: int) -> str:
        """Which engine a rank has, or which part of it, in words; "" without one."""
        place = self.places[rank] if self.places else None
        if place is None:
            return ""
        number = self.heads.index(place.ranks[0] if place.ranks else rank)
        return f"{number}" if not place.ranks else f"{number}, part {place.ranks.index(rank)}"


@dataclass(frozen=True)
class Found:
    """What the settings resolve to."""

    config: Config
    job: DryRun
    cluster: Cluster
    device: Literal["cpu", "cuda"]
    arch: Architecture
    shape_from: str  #: where the shape of the model was found
    layout: Layout
    groups: dict[str, list[list[int]]]  #: axis -> its groups of ranks
    ranks: list[RankPlace]
    engines: Engines | None  #: None: the stage has none
    switches: tuple[str, ...]  #: of Megatron-Core's, those that are on if the machines have all that they need
