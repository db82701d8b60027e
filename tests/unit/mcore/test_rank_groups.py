"""Groups without a process group are those that Megatron-Core builds."""

from __future__ import annotations

from itertools import chain

import pytest
import torch.distributed as dist

from megatron_r1.config.model import ParallelConfig
from megatron_r1.mcore import host

host.activate("cpu")

from megatron_r1.mcore.layout import resolve_layout
from megatron_r1.mcore.meta import meta_ranks
from megatron_r1.mcore.parallel import find_share
from megatron_r1.mcore.rank_groups import rank_groups, share_groups
from megatron_r1.model.presets import PRESETS


@pytest.mark.parametrize(
    ("sizes", "world_size"), [({"tp": 2, "pp": 2, "ep": 4}, 16), ({"tp": 2, "ep": 2, "etp": 2}, 8), ({"cp": 2, "pp": 2}, 8)]
)
def test_groups_are_those_that_are_built(sizes: dict[str, int], world_size: int) -> None:
    arch = PRESETS["tiny"]
    layout = resolve_layout(ParallelConfig(**sizes), arch, world_size, mtp=False)
    groups = rank_groups(layout)
    for number, rank in zip((1, world_size - 2), meta_ranks(arch, layout, (1, world_size - 2)), strict=True):
        for axis, of_axis in groups.items():
            assert sorted(chain(*of_axis)) == list(range(world_size))
            (mine,) = (group for group in of_axis if number in group)
            assert mine == dist.get_process_group_ranks(getattr(rank.groups, axis)), axis
        (mine,) = (group for group in share_groups(layout) if number in group)
        assert mine == dist.get_process_group_ranks(find_share().peers) and len(mine) == layout.tp * layout.cp * layout.pp
