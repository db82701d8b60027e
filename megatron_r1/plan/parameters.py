"""How many parameters a rank holds, by the rows that the family lists and the layout: what the builder allocates, unbuilt.

All ranks of a pipeline stage hold the same number: heads, widths and experts are divided evenly, the vocabulary is padded.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_r1.mcore.layout import Layout, padded_vocabulary
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Block, Row, Split
from megatron_r1.types import round_up

_PARAMETER_START = 64  #: elements that a parameter of a gradient buffer begins at a multiple of
_BUFFER_END = 128  #: and with the data-parallel ranks, what a buffer ends at a common multiple of
_EMBEDDING = "embedding.word_embeddings.weight"
_BIAS_BYTES = 8  #: of an expert: its routing bias and its count of tokens, float32
_COUNTED_APART = "router.expert_bias"


@dataclass(frozen=True)
class HeldParameters:
    """Of one rank, all virtual stages together."""

    dense: int  #: trained, outside experts
    experts: int  #: trained, of experts
    frozen: int  #: without gradient
    dense_buffer: int  #: elements of the gradient buffers of `dense`, padding included
    expert_buffer: int  #: the same of `experts`
    buffer_bytes: int  #: of routing biases and counts, which are no parameters
    largest: int  #: elements of the largest parameter

    @property
    def all(self) -> int:
        """Parameters."""
        return self.dense + self.experts + self.frozen


@dataclass(frozen=True)
class _Held:
    numel: int
    is_expert: bool
    is_trained: bool


def held_parameters(
    arch: Architecture, layout: Layout, stage: int, *, trains_mtp: bool = False, freeze_router: bool = False, trains: bool = True
) -> HeldParameters:
    """What a rank of a pipeline stage holds.

    Args:
        stage: from 0 to `layout.pp` - 1.
        trains_mtp: whether multi-token prediction is trained; its weights are there in any case.
        freeze_router: as `grpo.freeze_router`.
        trains: whether the model has an optimizer.
    """
    dense_ranks, expert_ranks = gradient_ranks(layout)
    dense = experts = frozen = dense_buffer = expert_buffer = largest = biases = 0
    for chunk in range(stage, layout.pp * layout.vpp, layout.pp):
        tensors = list(_of_chunk(arch, layout, chunk, trains_mtp, freeze_router, trains))
        biases += sum(tensor.numel for tensor in tensors if tensor.numel < 0)
        tensors = [tensor for tensor in tensors if tensor.numel > 0]
        largest = max([largest, *(tensor.numel for tensor in tensors)])
        of_dense = [tensor.numel for tensor in tensors if tensor.is_trained and not tensor.is_expert]
        of_experts = [tensor.numel for tensor in tensors if tensor.is_trained and tensor.is_expert]
        frozen += sum(tensor.numel for tensor in tensors if not tensor.is_trained)
        dense, experts = dense + sum(of_dense), experts + sum(of_experts)
        dense_buffer += _buffer(of_dense, dense_ranks)
        expert_buffer += _buffer(of_experts, expert_ranks)
    return HeldParameters(dense, experts, frozen, dense_buffer, expert_buffer, -biases * _BIAS_BYTES, largest)


def gradient_ranks(layout: Layout) -> tuple[int, int]:
    """Ranks that share the optimizer of dense parameters, and of experts."""
    return layout.dp * layout.cp, layout.world_size // (layout.etp * layout.ep * layout.pp)


def _buffer(numels: list[int], ranks: int) -> int:
    if not numels:
        return 0
    starts = sum(round_up(numel, _PARAMETER_START) for numel in numels)
    end = math.lcm(ranks, _BUFFER_END)
    return round_up(starts, end)


def _of_chunk(
    arch: Architecture, layout: Layout, chunk: int, trains_mtp: bool, freeze_router: bool, trains: bool
) -> Iterator[_Held]:
    """Every parameter of one virtual stage; a routing bias as a negative number of experts."""
    counts = layout.decoder_layers(arch.num_hidden_layers)
    first, last = sum(counts[:chunk]), sum(counts[: chunk + 1])
    is_first, is_last = chunk == 0, chunk == len(counts) - 1
    for block in arch.blocks():
        for row in block.rows:
            name = f"{block.megatron}{row.megatron[0]}"
            if not _stands_in(block, name, arch, first, last, is_first, is_last):
                continue
            if name.endswith(_COUNTED_APART):
                yield _Held(-row.shapes[0][0], is_expert=False, is_trained=False)
                continue
            is_frozen = (name.startswith("mtp.") and not trains_mtp) or (freeze_router and name.endswith("router.weight"))
            times = arch.experts.count // layout.ep if row.is_expert and arch.experts is not None else 1
            for _ in range(times):
                yield _Held(_local(row, layout), row.is_expert, trains and not is_frozen)


def _stands_in(block: Block, name: str, arch: Architecture, first: int, last: int, is_first: bool, is_last: bool) -> bool:
    if block.megatron.startswith("decoder.layers."):
        return first <= int(block.megatron.split(".")[2]) < last
    if name == _EMBEDDING:
        # The last stage holds a copy for multi-token prediction, or as its output layer where both are one.
        return is_first or (is_last and (arch.mtp_depth > 0 or (arch.tie_word_embeddings and not arch.is_reward_model)))
    return is_last


def _local(row: Row, layout: Layout) -> int:
    """Elements that a rank holds of one expert's, or of everybody's, tensor."""
    whole = sum(math.prod(shape) for shape in row.shapes)
    if row.split is Split.REPLICATED:
        return whole
    if row.split is Split.VOCAB:
        return padded_vocabulary(row.shapes[0][0], layout.tp) // layout.tp * row.shapes[0][1]
    return whole // (layout.etp if row.is_expert else layout.tp)
