"""What of a device is neither the model's nor the engine's. Assumptions, each with its reason: no run has measured them."""

from __future__ import annotations

from megatron_r1.mcore.layout import Layout
from megatron_r1.plan.parameters import gradient_ranks

#: What the driver keeps (559 MiB between what nvidia-smi and torch show of an H100), the CUDA context, and the work spaces of
#: cuBLAS and of attention.
CONTEXT = 1.5e9
#: Of one communicator of NCCL 2: 16 channels with a ring and a tree each, and for either 9.4 MB of buffers (4 MiB for the simple
#: protocol, 4.7 MiB for LL128, 0.5 MiB for LL).
COMMUNICATOR = 16 * 2 * 9.4e6
#: Of what comes and goes: blocks of the allocator that are not full, with expandable segments.
FRAGMENTATION = 0.05


def communicators(layout: Layout) -> int:
    """Groups of more than one rank that a rank communicates in while it trains: one for each axis, and that of the whole model."""
    dense, experts = gradient_ranks(layout)
    axes = (layout.tp, layout.pp, layout.cp, layout.ep, layout.etp, dense, experts)
    return sum(size > 1 for size in axes) + (layout.world_size > 1) + (layout.tp * layout.pp > 1)
