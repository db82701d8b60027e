"""What a model asks of a device for each token: matrix elements, pairs of attention, cached values, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Row

_MULTIPLY_AND_ADD = 2


@dataclass(frozen=True)
class ModelWork:
    """A model, layer by layer alike; counts are elements of matrices unless said."""

    hidden: int
    vocabulary: int
    layers: int  #: without multi-token prediction
    moe_layers: int  #: of these
    attention: int  #: of one layer
    dense: int  #: of a dense layer's feed-forward
    shared: int  #: of router and shared experts of a layer
    expert: int  #: of one routed expert
    experts: int  #: routed, of a layer
    per_token: int  #: experts that a token is sent to
    expert_width: int  #: of one expert's feed-forward, or the dense one
    expert_groups: int  #: groups of experts that a token may use, where there are any; 0: no limit
    pair_flops: int  #: of a position and one that it attends to, in one layer, forward
    absorbed_pair_flops: int  #: the same in decoding, where latent attention works on its compressed rows
    cached: int  #: values of a token in one layer
    cache_shares: int  #: ranks that tensor parallelism may cut the cache into; 1: each has all of it
    head_rows: int  #: copies of vocabulary x hidden: 1 tied, else 2
    mtp: int  #: layers of multi-token prediction
    tensors: int  #: that a transfer of weights names one by one

    @property
    def dense_layers(self) -> int:
        """Layers without experts."""
        return self.layers - self.moe_layers

    @property
    def parameters(self) -> int:
        """All matrices of the model, multi-token prediction left out."""
        experts = self.moe_layers * self.experts * self.expert
        return experts + self.unrouted

    @property
    def unrouted(self) -> int:
        """Matrices that every rank of data parallelism holds or shares: all but routed experts."""
        return (
            self.layers * self.attention + self.moe_layers * self.shared + self.dense_layers * self.dense
            + self.head_rows * self.head
        )  # fmt: skip

    @property
    def head(self) -> int:
        """The output layer."""
        return self.vocabulary * self.hidden

    @property
    def active(self) -> int:
        """Matrices that a token is multiplied with, the output layer included, the embedding not."""
        routed = self.moe_layers * self.per_token * self.expert
        return self.unrouted - (self.head_rows - 1) * self.head + routed

    def token_flops(self, pairs: float) -> float:
        """Forward FLOPs of a token with so many pairs, as `model/flops.py` counts them."""
        return _MULTIPLY_AND_ADD * self.active + self.layers * self.pair_flops * pairs


def model_work(arch: Architecture) -> ModelWork:
    """The numbers of an architecture."""
    moe_layers = sum(arch.is_moe_layer(layer) for layer in range(arch.num_hidden_layers))
    last_rows = arch.feed_forward_rows(arch.num_hidden_layers - 1)
    dense_at = next((layer for layer in range(arch.num_hidden_layers) if not arch.is_moe_layer(layer)), None)
    dense = sum(map(_elements, arch.feed_forward_rows(dense_at))) if dense_at is not None else 0
    experts = arch.experts
    shared = sum(_elements(row) for row in last_rows if not row.is_expert) if experts else 0
    expert = sum(_elements(row) for row in last_rows if row.is_expert) if experts else 0
    latent = arch.ATTENTION == "latent"
    widths = sum(arch.head_widths())
    # Absorbed: queries meet the compressed row of keys, with its positions, and sum the compressed values (V2 section 2.1.2).
    absorbed = arch.cached_width + getattr(arch, "kv_lora_rank", 0) if latent else widths
    return ModelWork(
        hidden=arch.hidden_size, vocabulary=1 if arch.is_reward_model else arch.vocab_size, layers=arch.num_hidden_layers,
        moe_layers=moe_layers, attention=sum(map(_elements, arch.attention_rows())), dense=dense, shared=shared, expert=expert,
        experts=experts.count if experts else 0, per_token=experts.per_token if experts else 0,
        expert_width=experts.width if experts else arch.intermediate_size,
        expert_groups=getattr(arch, "topk_group", 0) if getattr(arch, "n_group", 1) > 1 else 0,
        pair_flops=_MULTIPLY_AND_ADD * arch.num_attention_heads * widths,
        absorbed_pair_flops=_MULTIPLY_AND_ADD * arch.num_attention_heads * absorbed,
        cached=arch.cached_width, cache_shares=1 if latent else arch.query_groups,
        head_rows=1 if arch.tie_word_embeddings else 2, mtp=arch.mtp_depth, tensors=_tensors(arch),
    )  # fmt: skip


def _elements(row: Row) -> int:
    return sum(math.prod(shape) for shape in row.shapes if len(shape) > 1)


def _tensors(arch: Architecture) -> int:
    count = arch.experts.count if arch.experts else 1
    return sum(len(row.shapes) * (count if row.is_expert else 1) for block in arch.blocks() for row in block.rows)
