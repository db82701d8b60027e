"""The process groups over which a Megatron model's weights are split."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch.distributed as dist


class WeightGroups(Protocol):
    """This rank's group on each axis that splits weights; None if the axis has one rank (`mcore.parallel.Groups` fits)."""

    @property
    def tp(self) -> dist.ProcessGroup | None:
        """Tensor parallel."""

    @property
    def etp(self) -> dist.ProcessGroup | None:
        """Tensor parallel inside experts."""

    @property
    def ep(self) -> dist.ProcessGroup | None:
        """Expert parallel."""

    @property
    def pp(self) -> dist.ProcessGroup | None:
        """Pipeline parallel."""


@dataclass(frozen=True)
class OneRank:
    """The groups of a model that is not split."""

    tp: None = None
    etp: None = None
    ep: None = None
    pp: None = None


def group_size(group: dist.ProcessGroup | None) -> int:
    """Number of ranks of a group."""
    return 1 if group is None else dist.get_world_size(group)


def group_rank(group: dist.ProcessGroup | None) -> int:
    """This rank's place in a group."""
    return 0 if group is None else dist.get_rank(group)
