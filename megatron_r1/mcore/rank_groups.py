"""Every group of ranks of a layout, as Megatron-Core itself numbers them, without a process group."""

from __future__ import annotations

import inspect

from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.layout import Layout

require_active()

from megatron.core import parallel_state

_ORDER = inspect.signature(parallel_state.initialize_model_parallel).parameters["order"].default


def rank_groups(layout: Layout) -> dict[str, list[list[int]]]:
    """Axis -> its groups, each with its ranks in order. ep, etp and expert_dp are of experts, the others of everything else."""
    expert_dp = layout.world_size // (layout.etp * layout.ep * layout.pp)
    dense = _dense(layout)
    experts = parallel_state.RankGenerator(tp=layout.etp, ep=layout.ep, dp=expert_dp, pp=layout.pp, cp=1, order=_ORDER)
    return {axis: dense.get_ranks(axis) for axis in ("tp", "cp", "dp", "pp")} | {
        "ep": experts.get_ranks("ep"),
        "etp": experts.get_ranks("tp"),
        "expert_dp": experts.get_ranks("dp"),
    }


def share_groups(layout: Layout) -> list[list[int]]:
    """The ranks that compute the same samples together, over tensor, context and pipeline parallelism."""
    return _dense(layout).get_ranks("tp-cp-pp")


def _dense(layout: Layout) -> parallel_state.RankGenerator:
    return parallel_state.RankGenerator(tp=layout.tp, ep=1, dp=layout.dp, pp=layout.pp, cp=layout.cp, order=_ORDER)
