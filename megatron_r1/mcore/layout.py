"""How a model is laid out over ranks, checked before anything is built. Pure: no torch.distributed, no Megatron-Core."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.config.model import ParallelConfig
from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture


@dataclass(frozen=True)
class Layout:
    """Sizes of every kind of parallelism; tp * pp * cp * dp = world_size."""

    tp: int = 1  #: tensor
    pp: int = 1  #: pipeline
    vpp: int = 1  #: virtual pipeline stages per rank
    ep: int = 1  #: expert
    etp: int = 1  #: tensor inside experts
    cp: int = 1  #: context
    dp: int = 1  #: data (of everything but experts)
    sequence_parallel: bool = False
    world_size: int = 1

    @property
    def pad_multiple(self) -> int:
        """What the length of a packed micro-batch is a multiple of."""
        return self.tp * self.cp * 2

    @property
    def count_multiple(self) -> int:
        """What the number of micro-batches of a data-parallel rank is a multiple of: an interleaved pipeline needs that."""
        return self.pp if self.vpp > 1 else 1


def group_sizes(layout: Layout) -> list[int]:
    """Members of every group that Megatron-Core makes for one rank of the layout, and that torch connects."""
    tp, pp, cp, dp, ep, etp = layout.tp, layout.pp, layout.cp, layout.dp, layout.ep, layout.etp
    expert_dp = layout.world_size // (etp * ep * pp)
    embeddings = [min(pp, 2), 1]  # of the ends of a pipeline: word embeddings, position embeddings
    whole = tp * cp * dp
    return [
        dp * cp, dp * cp, dp, dp, cp, tp * pp, tp, pp, *embeddings, whole, tp * dp, tp * cp,
        ep, etp, etp * ep, etp * ep * pp, expert_dp, expert_dp, layout.world_size,
    ]  # fmt: skip


def resolve_layout(parallel: ParallelConfig, arch: Architecture, world_size: int, *, mtp: bool, packed: bool) -> Layout:
    """The layout that `parallel` asks for on `world_size` ranks.

    Args:
        parallel: sizes; data parallelism is what is left.
        arch: the model that is laid out.
        world_size: number of processes.
        mtp: whether multi-token prediction is trained.
        packed: whether micro-batches are packed by `data.packing`, whose sequences have any length.

    Raises:
        ConfigError: the sizes do not divide the world or the model, or Megatron-Core 0.16.1 cannot or wrongly computes it.
    """
    tp, pp, vpp, ep, cp = parallel.tp, parallel.pp, parallel.vpp, parallel.ep, parallel.cp
    etp = parallel.etp or (tp if ep == 1 else 1)
    sequence_parallel = tp > 1 if parallel.sequence_parallel is None else parallel.sequence_parallel

    _require_fit(
        world_size % (tp * pp * cp) == 0, f"parallel.tp={tp} x pp={pp} x cp={cp} does not divide the {world_size} processes"
    )
    _require_fit(
        world_size % (etp * ep * pp) == 0,
        f"parallel.ep={ep} x etp={etp} x pp={pp} does not divide the {world_size} processes",
    )
    _check_model(arch, tp, ep, etp)
    _check_pipeline(arch, pp, vpp)
    _require_fit(
        etp == tp or ep > 1,
        f"parallel.etp={etp} with tp={tp} needs parallel.ep above 1: Megatron-Core computes expert gradients wrongly otherwise",
    )
    _require_fit(
        sequence_parallel or tp == 1,
        f"parallel.sequence_parallel=false with tp={tp}: MLA's replicated key down-projection loses the sum of its gradient over "
        "tensor parallel ranks, and Megatron-Core does not train mixture-of-experts layers that way; leave it unset",
    )
    _require_fit(not sequence_parallel or tp > 1, "parallel.sequence_parallel=true needs parallel.tp above 1; leave it unset")
    _require_fit(
        not (packed and cp > 1),
        f"parallel.cp={cp} needs sequence lengths divisible by {2 * cp}, and packed sequences have any length: set parallel.cp=1",
    )
    _require_fit(
        not mtp or arch.mtp_depth > 0,
        "moe.mtp_loss_scale above 0 needs a model with num_nextn_predict_layers above 0",
    )
    return Layout(tp, pp, vpp, ep, etp, cp, world_size // (tp * pp * cp), sequence_parallel, world_size)


def smallest_layout(parallel: ParallelConfig, arch: Architecture) -> Layout:
    """The layout of these sizes on as few ranks as they need. Raises ConfigError if the sizes do not fit the model."""
    etp = parallel.etp or (parallel.tp if parallel.ep == 1 else 1)
    world_size = parallel.pp * math.lcm(parallel.tp * parallel.cp, etp * parallel.ep)
    return resolve_layout(parallel, arch, world_size, mtp=False, packed=False)


def stage_layers(num_layers: int, stages: int) -> list[int]:
    """Decoder layers of every pipeline stage; the first ones take the rest, since the last also has the output head."""
    base, rest = divmod(num_layers, stages)
    return [base + (stage < rest) for stage in range(stages)]


def padded_vocabulary(size: int, tp: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks: rows that no token has are added until they divide."""
    return -(-size // tp) * tp


def _check_model(arch: Architecture, tp: int, ep: int, etp: int) -> None:
    _require_fit(
        ep == 1 or arch.experts is not None,
        f"parallel.ep={ep} needs a model with experts, {arch.model_type} has none: leave it unset",
    )
    for axis, size in (("tp", tp), ("ep", ep), ("etp", etp)):
        for what, dimension in arch.split_sizes()[axis].items():
            _require_fit(dimension % size == 0, f"parallel.{axis}={size} does not divide {what}={dimension} of the model")


def _check_pipeline(arch: Architecture, pp: int, vpp: int) -> None:
    layers = arch.num_hidden_layers
    _require_fit(vpp == 1 or pp > 1, f"parallel.vpp={vpp} needs parallel.pp above 1")
    _require_fit(pp * vpp <= layers, f"parallel.pp={pp} x vpp={vpp} needs at least {pp * vpp} layers, the model has {layers}")


def _require_fit(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)
