"""Any rank of any layout in one process, on the meta device: what that rank would hold, without its memory or its peers.

The process group is torch's fake one, in which one process plays a rank of a world of any size and collectives do nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore.active import require_active
from megatron_r1.model.architecture import Architecture

require_active()

from megatron.core import parallel_state
from megatron.core.tensor_parallel import layers

from megatron_r1.mcore import parallel
from megatron_r1.mcore.provider import build_model


@dataclass(frozen=True)
class MetaRank:
    """One rank: its modules on the meta device, one per virtual pipeline stage, and its groups of the fake world."""

    modules: list[torch.nn.Module]
    groups: parallel.Groups


def meta_ranks(arch: Architecture, layout: parallel.Layout, ranks: Iterable[int]) -> Iterator[MetaRank]:
    """Build these ranks one after the other; each exists until the next one is asked for.

    Args:
        arch: the model's shape.
        layout: how the model is split.
        ranks: numbers of the ranks to build.

    Raises:
        RuntimeError: this process is in a process group already.
    """
    if dist.is_initialized():
        raise RuntimeError("the meta device needs a fake process group: use it before the process joins a real one")
    random_state = torch.get_rng_state()
    with _quick_start():
        for rank in ranks:
            dist.init_process_group(dist.Backend.FAKE, store=FakeStore(), rank=rank, world_size=layout.world_size)
            try:
                parallel.build_process_groups(layout, seed=0)
                with torch.device("meta"):
                    modules = build_model(arch, layout, RuntimeConfig(dtype="bf16"), MoeTrainingConfig(), seed=0)
                yield MetaRank(modules, parallel.groups())
            finally:
                parallel_state.destroy_model_parallel()
                dist.destroy_process_group()
                torch.set_rng_state(random_state)


@contextmanager
def _quick_start() -> Iterator[None]:
    """Leave out what takes a rank most of its start and what the meta device does not need.

    Megatron-Core makes every group of the world on every rank, 6,500 for 1,024 ranks. Here a group without the rank costs nothing,
    and the members of all groups are computed once for all ranks. On a host without CUDA, Megatron-Core draws every weight whole.
    """
    stock = parallel_state.create_group, parallel_state.RankGenerator.get_ranks, layers._initialize_affine_weight_cpu
    create_group, get_ranks, _ = stock
    known: dict[tuple[Any, ...], list[list[int]]] = {}

    def create_own_group(ranks: list[int], *args: Any, **kwargs: Any) -> dist.ProcessGroup | object:
        if dist.get_rank() not in ranks:
            return dist.GroupMember.NON_GROUP_MEMBER
        return create_group(ranks, *args, **kwargs | {"backend": dist.Backend.FAKE})

    def get_known_ranks(self: parallel_state.RankGenerator, token: str) -> list[list[int]]:
        key = (self.order, *self.ordered_size, self.rank_offset, token)
        if key not in known:
            known[key] = get_ranks(self, token)
        return known[key]

    parallel_state.create_group = create_own_group
    parallel_state.RankGenerator.get_ranks = get_known_ranks
    layers._initialize_affine_weight_cpu = lambda *_, **__: None
    try:
        yield
    finally:
        parallel_state.create_group, parallel_state.RankGenerator.get_ranks, layers._initialize_affine_weight_cpu = stock
