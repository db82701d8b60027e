"""Seconds of a layer, part by part: matrix products, attention, what only moves memory, and what travels between ranks.

A part's time is its FLOPs over what products reach, or its bytes over what memory or a link reaches (the roofline model, Williams
et al., 2009). Parts of a rank follow each other, but for what a schedule hides.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.work import ModelWork

_BF16 = 2
#: Times that an element of the hidden state passes memory in a layer's forward pass beside the products: norms, residuals, RoPE,
#: the layouts of packed attention. And an element of the feed-forward's width: gate, up, their product.
_PASSES_OF_HIDDEN, _PASSES_OF_WIDTH = 24, 6
_PASSES_OF_ROUTED = 6  # of a token's copy for an expert: permuted, sent, received, sorted, and back

PARTS = ("products", "experts", "attention", "memory", "tensor", "dispatch", "launch")


@dataclass(frozen=True)
class Grid:
    """Sizes of a layout, and how far its groups reach."""

    devices: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    etp: int = 1

    @property
    def dp(self) -> int:
        """Copies of the model, of which each has its own samples."""
        return max(self.devices // (self.tp * self.pp * self.cp), 1)

    @property
    def expert_dp(self) -> int:
        """Copies of an expert."""
        return max(self.devices // (self.etp * self.ep * self.pp), 1)


@dataclass(frozen=True)
class Costs:
    """What depends on programs rather than on devices: one set for all."""

    launch: float = 0.45e-3  #: seconds that the host needs to start a layer's forward pass; hidden while the device is slower
    expert_launch: float = 0.58e-3  #: seconds that a layer with experts adds to each pass: numbers of tokens reach the host
    captured: float = 0.25  #: share of both where layers are captured as CUDA graphs
    imbalance: float = 1.3  #: tokens of the fullest rank of an expert group, over the mean, where a router balances by itself
    hidden_dispatch: float = 0.7  #: share of the expert traffic that a schedule hides which overlaps it


COSTS = Costs()


@dataclass(frozen=True)
class LayerPass:
    """What goes through a layer."""

    tokens: float  #: of a micro-batch, all ranks of tensor and context parallelism together
    pairs: float  #: of attention, a token
    fp8: bool = False
    balanced: bool = False  #: whether routing is forced to be even, as benchmarks of pretraining do
    graphs: bool = False  #: whether layers are captured as CUDA graphs
    overlapped: bool = False  #: whether expert traffic runs beside other micro-batches' computation
    deepep: bool = False  #: whether tokens reach experts by DeepEP
    costs: Costs = COSTS


def forward_layer(work: ModelWork, device: Accelerator, grid: Grid, what: LayerPass, *, moe: bool) -> dict[str, float]:
    """Seconds of a layer's forward pass on one rank, by the names of `PARTS`."""
    tokens = what.tokens / grid.cp
    own = tokens / grid.tp  # sequence parallelism shares out what is not split by heads or width
    linear = work.attention + (work.shared if moe else work.dense)
    parts = dict.fromkeys(PARTS, 0.0)
    parts["products"] = 2 * tokens * linear / grid.tp / device.gemm_flops(fp8=what.fp8)
    parts["attention"] = work.pair_flops * what.pairs * tokens / grid.tp / device.attention_flops
    width = 0 if moe else work.expert_width
    moved = own * (_PASSES_OF_HIDDEN * work.hidden + _PASSES_OF_WIDTH * width) * _BF16
    if grid.tp > 1:
        share = (grid.tp - 1) / grid.tp
        parts["tensor"] = 4 * tokens * work.hidden * _BF16 * share / device.link_rate(grid.tp > device.domain)
    if moe:
        imbalance = 1.0 if what.balanced or grid.ep == 1 else what.costs.imbalance
        routed = own * work.per_token * imbalance
        local = work.experts / grid.ep * work.expert / grid.etp
        flops = 2 * routed * work.expert / device.gemm_flops(fp8=what.fp8, grouped=True)
        parts["experts"] = flops + local * _BF16 / device.memory_rate
        moved += routed * (_PASSES_OF_ROUTED * work.hidden + _PASSES_OF_WIDTH * work.expert_width) * _BF16
        if grid.ep * grid.etp > 1:
            parts["dispatch"] = _dispatch(work, device, grid, what, own * work.hidden * _BF16 * imbalance)
            if what.overlapped:
                parts["dispatch"] *= 1 - what.costs.hidden_dispatch
    parts["memory"] = moved / device.memory_rate
    busy = sum(parts.values())
    share = what.costs.captured if what.graphs else 1.0
    parts["launch"] = max(what.costs.launch * share - busy, 0.0) + (what.costs.expert_launch * share if moe else 0.0)
    return parts


def backward_layer(forward: dict[str, float], *, recompute: float = 0.0) -> dict[str, float]:
    """Seconds of the backward pass, which repeats the share `recompute` of the forward pass first.

    Products are twice the forward's, one for the input and one for the weight; attention is 2.5 times, its scores are computed
    again; traffic is the same again, and tensor parallelism gathers its input once more for the weight's gradient.
    """
    factors = {"products": 2.0, "experts": 2.0, "attention": 2.5, "memory": 2.0, "tensor": 1.25, "dispatch": 1.0, "launch": 1.0}
    return {part: seconds * (factors[part] + recompute) for part, seconds in forward.items()}


def head_seconds(work: ModelWork, device: Accelerator, grid: Grid, tokens: float) -> float:
    """Of the output layer's forward pass over a micro-batch's tokens: the product, and its logits in fp32 written and read."""
    own = tokens / grid.cp
    logits = 4 * own * work.vocabulary / grid.tp
    return 2 * own * work.head / grid.tp / device.gemm_flops() + 3 * logits / device.memory_rate


def _dispatch(work: ModelWork, device: Accelerator, grid: Grid, what: LayerPass, sent: float) -> float:
    """Seconds in which `sent` bytes of hidden states, each for so many experts and all ranks of one, reach them and come back.

    The ranks of an expert group are neighbours. An all-to-all sends a copy for each expert; DeepEP (V3 section 3.2.2) one to each
    other node, from where NVLink spreads it.
    """
    copies, group = work.per_token * grid.etp, grid.ep * grid.etp
    inside = min(max(device.domain // grid.etp, 1), grid.ep)
    domains = -(-grid.ep // inside)
    if domains == 1:
        return 2 * sent * copies * (group - 1) / group / device.link_rate(group > device.domain)
    if what.deepep:
        near, far = copies, max(_domains_of_a_token(work, domains) - 1, 0.0)
        return 2 * max(sent * near / device.link_rate(False), sent * far / device.link_rate(True))
    far = copies * (domains - 1) / domains
    return 2 * sent * ((copies - far) / device.link_rate(False) + far / device.link_rate(True))


def _domains_of_a_token(work: ModelWork, domains: int) -> float:
    """NVLink domains that a token's experts lie in, in the mean, if all experts are as likely."""
    expected = domains * (1 - (1 - 1 / domains) ** work.per_token)
    return min(expected, work.expert_groups) if work.expert_groups else expected
