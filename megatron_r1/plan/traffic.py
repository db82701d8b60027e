"""Bytes that a rank hands to collectives and to its neighbours: in an update, and when engines get new weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture
from megatron_r1.plan.parameters import gradient_ranks, held_parameters
from megatron_r1.rollout.options import engine_weight_bytes

_FLOAT32 = 4


@dataclass(frozen=True)
class UpdateTraffic:
    """Of one rank of a pipeline stage, in one update: the whole tensors of a collective, what is sent of the rest."""

    gradients: int  #: reduced and scattered over data-parallel ranks, once an update
    weights: int  #: gathered from them afterwards
    pipeline: int  #: hidden states to the next stage, and their gradients to the one before
    experts: int  #: hidden states to experts of other ranks and back, in the forward and the backward pass
    tensor: int | None  #: gathered and scattered over tensor-parallel ranks; None: not counted, of experts and latent attention


def update_traffic(
    arch: Architecture, layout: Layout, stage: int, *, tokens: int, micro_batches: int, width: int, recompute: str = "none",
    trains_mtp: bool = False,
) -> UpdateTraffic:  # fmt: skip
    """For micro-batches of so many tokens over their context-parallel ranks; virtual stages are counted together.

    Args:
        width: bytes of a weight and of a hidden number.
        recompute: as `runtime.recompute`; what is computed again travels again.
    """
    held = held_parameters(arch, layout, stage, trains_mtp=trains_mtp)
    dense, experts = gradient_ranks(layout)
    shared = held.dense_buffer * (dense > 1) + held.expert_buffer * (experts > 1)
    positions = tokens // layout.cp // layout.tp
    hidden = positions * arch.hidden_size * width
    chunks = range(stage, layout.pp * layout.vpp, layout.pp)
    last = layout.pp * layout.vpp - 1
    hops = sum((chunk < last) + (chunk > 0) for chunk in chunks) if layout.pp > 1 else 0
    experts_away = _expert_layers(arch, layout, stage, trains_mtp) * _dispatches(recompute) * _copies(arch, layout)
    return UpdateTraffic(
        gradients=_FLOAT32 * shared,
        weights=width * shared,
        pipeline=hops * hidden * micro_batches,
        experts=experts_away * hidden * micro_batches,
        tensor=_tensor_passes(arch, layout, stage, recompute, hidden * layout.tp, micro_batches),
    )


def sync_bytes(arch: Architecture, dtype: Literal["float32", "bfloat16"]) -> int:
    """Of all tensors that an engine is given, each whole and once; multi-token prediction stays with the trainer."""
    return engine_weight_bytes(arch, dtype)


def _dispatches(recompute: str) -> int:
    """Journeys of the tokens of a layer: there and back, and their gradients."""
    return 6 if recompute == "full" else 4


def _tensor_passes(
    arch: Architecture, layout: Layout, stage: int, recompute: str, whole: int, micro_batches: int
) -> int | None:  # fmt: skip
    """Both blocks of a layer gather what they take and scatter what they give; the backward pass does the reverse, and gathers what
    they took once more. The embedding scatters, the output layer gathers.
    """
    if layout.tp == 1:
        return 0
    if arch.experts is not None or arch.ATTENTION == "latent":
        return None
    counts = layout.decoder_layers(arch.num_hidden_layers)
    layers = sum(counts[chunk] for chunk in range(stage, layout.pp * layout.vpp, layout.pp))
    each = 4 + 6 + (4 if recompute == "full" else 0)
    ends = 2 * (stage == 0) + 3 * (stage == layout.pp - 1)
    return (each * layers + ends) * whole * micro_batches


def _copies(arch: Architecture, layout: Layout) -> int:
    """Of a token, on their way to experts of other ranks."""
    return arch.experts.per_token if arch.experts is not None and layout.ep > 1 else 0


def _expert_layers(arch: Architecture, layout: Layout, stage: int, trains_mtp: bool) -> int:
    counts = layout.decoder_layers(arch.num_hidden_layers)
    found = 0
    for chunk in range(stage, layout.pp * layout.vpp, layout.pp):
        found += sum(arch.is_moe_layer(layer) for layer in range(sum(counts[:chunk]), sum(counts[: chunk + 1])))
    return found + (arch.mtp_depth if trains_mtp and stage == layout.pp - 1 and arch.experts is not None else 0)
