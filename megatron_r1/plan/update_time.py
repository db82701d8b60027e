"""Seconds of passes over a batch: an update of the weights, or log-probabilities alone, on one layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.plan.devices import Accelerator
from megatron_r1.plan.layer_time import COSTS, PARTS, Costs, Grid, LayerPass, backward_layer, forward_layer, head_seconds
from megatron_r1.plan.work import ModelWork

_GRADIENT, _WEIGHT = 4, 2  # bytes that travel: sums of gradients in fp32, weights in bf16
_OPTIMIZER = 40  # bytes of memory that a weight's step reads and writes: gradient, master, two moments, twice, and the norm
_HOST_MEMORY = 25e9  # bytes a second of host memory, for one of a node's devices: eight share some 200 GB/s
PCIE = 25e9  #: bytes a second between a device and its host, each way: PCIe 4 x16, or half of PCIe 5
_HOPS = 2  # directions in which a pipeline's activations travel


@dataclass(frozen=True)
class TrainedBatch:
    """What one update is computed on, over all copies of the model."""

    tokens: float
    pairs: float  #: of attention, a token: the mean of (length + 1) / 2 over tokens
    micro_batch: float  #: most tokens of a forward pass of one copy
    sequences: float = 0.0  #: among which the tokens are; 0: rows of one length
    variation: float = 0.0  #: standard deviation of their lengths over the mean


@dataclass(frozen=True)
class Training:
    """How an update is made."""

    recompute: float = 0.0  #: share of the forward pass that the backward pass repeats: 1 full
    fp8: bool = False
    balanced_routing: bool = False
    overlapped_dispatch: bool = False
    deepep: bool = False
    graphs: bool = False  #: layers are captured as CUDA graphs
    overlapped_reduction: bool = False  #: gradients and weights travel beside computation
    dual_pipe: bool = False  #: V3's schedule: half of the stages wait, and that with weight gradients
    even_ranks: bool = True  #: whether copies of the model get equal numbers of tokens; else as chance has it
    mtp: bool = False
    offloaded_optimizer: float = 0.0  #: share of Adam's state that stays on the host, where the step is made
    whole_logits: float = math.inf  #: most bytes of a micro-batch's logits that a rank keeps; more are computed again, by tiles


def micro_batches(batch: TrainedBatch, grid: Grid, training: Training) -> tuple[int, float]:
    """Micro-batches of the copy that has most, and tokens of one."""
    own = batch.tokens / grid.dp
    if not training.even_ranks and batch.sequences and grid.dp > 1:
        # The largest of dp sums of n lengths each, near the mean plus sqrt(2 ln dp) standard deviations.
        own *= 1 + batch.variation / math.sqrt(max(batch.sequences / grid.dp, 1)) * math.sqrt(2 * math.log(grid.dp))
    count = max(math.ceil(own / batch.micro_batch - 1e-9), 1)
    return count, own / count


def pass_seconds(
    work: ModelWork,
    device: Accelerator,
    grid: Grid,
    batch: TrainedBatch,
    training: Training,
    *,
    backward: bool,
    costs: Costs = COSTS,
) -> dict[str, float]:
    """Seconds of all micro-batches through the pipeline, by part; what waits in the pipeline is "bubble"."""
    count, tokens = micro_batches(batch, grid, training)
    what = LayerPass(
        tokens, batch.pairs, fp8=training.fp8, balanced=training.balanced_routing, graphs=training.graphs,
        overlapped=training.overlapped_dispatch, deepep=training.deepep, costs=costs,
    )  # fmt: skip
    stage = dict.fromkeys(PARTS, 0.0)
    mtp = work.mtp if training.mtp else 0
    for moe, layers in ((True, work.moe_layers + (mtp if work.moe_layers else 0)), (False, work.dense_layers)):
        if not layers:
            continue
        forward = forward_layer(work, device, grid, what, moe=moe)
        parts = [forward, backward_layer(forward, recompute=training.recompute)] if backward else [forward]
        for part in PARTS:
            stage[part] += sum(each[part] for each in parts) * layers / grid.pp
    head = head_seconds(work, device, grid, tokens)
    if backward:  # the logits, the gradients by the hidden states and by the weight, and by tiles the logits again
        logits = tokens / grid.cp * work.vocabulary / grid.tp * _WEIGHT
        head *= 3 if logits <= training.whole_logits else 4
    stage["products"] += head * (1 + mtp) / grid.pp  # stages are cut so that the last has fewer layers
    hop = 0.0
    if grid.pp > 1:
        size = tokens / grid.cp / grid.tp * work.hidden * _WEIGHT
        hop = size / device.link_rate(True) * (_HOPS if backward else 1) * grid.vpp
    one = sum(stage.values())
    waiting = (grid.pp - 1) / grid.vpp
    if training.dual_pipe:  # (PP/2 - 1)(F&B + B - 3W), V3 table 2, with F = 1, B = 2, W = 1: (1.5 + 2 - 3) / 3 of a micro-batch
        waiting = max(grid.pp / 2 - 1, 0) / 3
    return {part: seconds * count for part, seconds in stage.items()} | {"bubble": waiting * one, "pipeline": hop * count}


def update_seconds(
    work: ModelWork, device: Accelerator, grid: Grid, batch: TrainedBatch, training: Training, costs: Costs = COSTS
) -> dict[str, float]:
    """Seconds of one update of the weights, by part."""
    parts = pass_seconds(work, device, grid, batch, training, backward=True, costs=costs)
    own = own_parameters(work, grid)
    expert = work.moe_layers * work.experts * work.expert / (grid.pp * grid.ep * grid.etp)
    copies = grid.dp * grid.cp
    travel = 0.0
    for held, ranks, neighbours in ((own - expert, copies, grid.tp), (expert, grid.expert_dp, grid.ep * grid.etp)):
        if ranks > 1:
            near = neighbours * ranks <= device.domain
            travel += held * (_GRADIENT + _WEIGHT) * (ranks - 1) / ranks / device.link_rate(not near)
    parts["reduction"] = 0.0 if training.overlapped_reduction else travel
    share = (own - expert) / copies + expert / grid.expert_dp
    on_host = training.offloaded_optimizer
    parts["optimizer"] = share * _OPTIMIZER * (1 - on_host) / device.memory_rate
    parts["optimizer"] += share * on_host * (_OPTIMIZER / _HOST_MEMORY + (_GRADIENT + _WEIGHT) / PCIE)
    return parts


def own_parameters(work: ModelWork, grid: Grid) -> float:
    """Weights of a rank, in the mean over pipeline stages."""
    experts = work.moe_layers * work.experts * work.expert / (grid.ep * grid.etp)
    return (experts + work.unrouted / grid.tp) / grid.pp
