"""Model FLOPs: the multiplications and additions of a model's matrix products, from its shape alone.

Recomputation, padding, norms, softmax and RoPE are left out, and attention is causal: what is counted is what the model needs, not
what a machine happened to do. So a share of a device's peak (MFU, PaLM, arXiv 2204.02311, appendix B) says how good the machine's
use is. DeepSeek's own count for V3 is 250 GFLOPs a token of 4K (arXiv 2505.09343, table 2), this one's 250.5 without multi-token
prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Block, Row

_EMBEDDING, _OUTPUT_LAYER = "embedding.word_embeddings.weight", "output_layer.weight"
_MULTIPLY_AND_ADD = 2


@dataclass(frozen=True)
class Work:
    """What goes through a model, padding left out."""

    tokens: int  #: positions
    pairs: int  #: of a position and one that it attends to, itself included
    predicted: int  #: positions whose logits or scores count


def rows_of(rows: int, tokens: int) -> Work:
    """`rows` sequences of so many tokens each, all of which are predicted."""
    return Work(rows * tokens, rows * tokens * (tokens + 1) // 2, rows * tokens)


def forward_flops(arch: Architecture, work: Work, *, mtp: bool = False) -> int:
    """FLOPs of a forward pass. `mtp`: with multi-token prediction, whose every layer has logits of its own."""
    trunk, head = _trunk_flops(arch, work), _head_flops(arch, work)
    return trunk + head + (_mtp_flops(arch, work) + arch.mtp_depth * head if mtp else 0)


def update_flops(arch: Architecture, work: Work, *, mtp: bool = False, mtp_trains_trunk: bool = True) -> int:
    """FLOPs of forward and backward pass, which costs twice as much: a product for the input, and one for the weight.

    Args:
        mtp: whether multi-token prediction is trained.
        mtp_trains_trunk: False: the output layer learns nothing from it, which saves one product in three of its logits.
    """
    saved = arch.mtp_depth * _head_flops(arch, work) if mtp and not mtp_trains_trunk else 0
    return 3 * forward_flops(arch, work, mtp=mtp) - saved


def active_parameters(arch: Architecture) -> int:
    """Weights that one token is multiplied with, embedding and output layer included, multi-token prediction left out."""
    head = sum(math.prod(row.shapes[0]) for block in arch.blocks() for row in block.rows if row.megatron[0] == _OUTPUT_LAYER)
    return _weights_of_a_token(arch, _blocks_of_part(arch, mtp=False)) + arch.vocab_size * arch.hidden_size + head


def _trunk_flops(arch: Architecture, work: Work) -> int:
    weights = _weights_of_a_token(arch, _blocks_of_part(arch, mtp=False))
    return _MULTIPLY_AND_ADD * weights * work.tokens + arch.num_hidden_layers * _attention_flops(arch, work)


def _mtp_flops(arch: Architecture, work: Work) -> int:
    weights = _weights_of_a_token(arch, _blocks_of_part(arch, mtp=True))
    return _MULTIPLY_AND_ADD * weights * work.tokens + arch.mtp_depth * _attention_flops(arch, work)


def _head_flops(arch: Architecture, work: Work) -> int:
    width = 1 if arch.is_reward_model else arch.vocab_size
    return _MULTIPLY_AND_ADD * arch.hidden_size * width * work.predicted


def _attention_flops(arch: Architecture, work: Work) -> int:
    """Scores, and their sum of values, of one layer."""
    return _MULTIPLY_AND_ADD * arch.num_attention_heads * sum(arch.head_widths()) * work.pairs


def _blocks_of_part(arch: Architecture, *, mtp: bool) -> Iterable[Block]:
    return arch.mtp_blocks() if mtp else (block for block in arch.blocks() if not block.megatron.startswith("mtp."))


def _weights_of_a_token(arch: Architecture, blocks: Iterable[Block]) -> int:
    """Elements of the matrices that a token goes through; of the experts, those it is sent to. Not embedding and output layer."""
    return sum(_matrix(row) * _times(arch, row) for block in blocks for row in block.rows)


def _matrix(row: Row) -> int:
    if row.megatron[0] in (_EMBEDDING, _OUTPUT_LAYER):
        return 0  # a lookup; and the head, which only predicted positions need
    return sum(math.prod(shape) for shape in row.shapes if len(shape) > 1)


def _times(arch: Architecture, row: Row) -> int:
    return arch.experts.per_token if row.is_expert and arch.experts is not None else 1
