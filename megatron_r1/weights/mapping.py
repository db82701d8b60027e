"""The one table between Megatron-Core's parameter names and Hugging Face's, with shapes and how Megatron splits each tensor.

Import, export and the live weight sync all read it. Megatron's MLA undoes the interleaving of RoPE itself, so no rows are
permuted. The order of the table is the order in which weights are streamed: layer by layer.

A row of a layer starts inside the layer: Megatron's prefix is `decoder.layers.{n}.` or `mtp.layers.{k}.transformer_layer.`,
Hugging Face's `model.layers.{n}.` with the multi-token-prediction layers counted after the model's own. `{e}` is the expert.
How several Hugging Face tensors make one Megatron tensor is `fused_tensors.py`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.dense import DenseArchitecture


class Split(Enum):
    """How tensor parallelism cuts a Megatron tensor."""

    REPLICATED = "every rank has it whole"
    COLUMN = "axis 0"
    ROW = "axis 1"
    GLU = "axis 0 of two stacked matrices: a rank has a piece of the gate over the same piece of the up projection"
    QKV = "axis 0 of query, key and value, interleaved by query group: a rank has whole groups"
    VOCAB = "axis 0, padded with rows that Hugging Face does not have"


@dataclass(frozen=True)
class Row:
    """One kind of tensor."""

    megatron: tuple[str, ...]  #: spellings of the same tensor; Transformer Engine fuses norms and groups experts
    hf: tuple[str, ...]  #: one name; or gate and up; or query, key and value
    shapes: tuple[tuple[str, ...], ...]  #: of each Hugging Face tensor, in the words of `_sizes`
    split: Split = Split.REPLICATED
    when: str = "always"  #: a word of `_conditions`

    @property
    def is_expert(self) -> bool:
        """Split over expert parallelism and expert-tensor parallelism."""
        return "{e}" in self.hf[0]


#: Tied models have no output layer in Hugging Face; Megatron's last pipeline stage, if it is not the first, holds a copy.
FIRST = (
    Row(("embedding.word_embeddings.weight",), ("model.embed_tokens.weight",), (("vocab", "hidden"),), Split.VOCAB, "untied"),
    Row(("embedding.word_embeddings.weight", "output_layer.weight"), ("model.embed_tokens.weight",), (("vocab", "hidden"),),
        Split.VOCAB, "tied"),
)  # fmt: skip

MLA = (
    Row(("input_layernorm.weight", "self_attention.linear_q_proj.layer_norm_weight"), ("input_layernorm.weight",), (("hidden",),)),
    Row(("self_attention.linear_q_proj.weight",), ("self_attn.q_proj.weight",), (("heads*qk", "hidden"),), Split.COLUMN,
        "full query"),
    Row(("self_attention.linear_q_down_proj.weight",), ("self_attn.q_a_proj.weight",), (("q_lora", "hidden"),),
        when="query compression"),
    Row(("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
        ("self_attn.q_a_layernorm.weight",), (("q_lora",),), when="query compression"),
    Row(("self_attention.linear_q_up_proj.weight",), ("self_attn.q_b_proj.weight",), (("heads*qk", "q_lora"),), Split.COLUMN,
        "query compression"),
    Row(("self_attention.linear_kv_down_proj.weight",), ("self_attn.kv_a_proj_with_mqa.weight",), (("kv_lora+rope", "hidden"),)),
    Row(("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
        ("self_attn.kv_a_layernorm.weight",), (("kv_lora",),)),
    Row(("self_attention.linear_kv_up_proj.weight",), ("self_attn.kv_b_proj.weight",), (("heads*(nope+v)", "kv_lora"),),
        Split.COLUMN),
    Row(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), (("hidden", "heads*v"),), Split.ROW),
    Row(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), ("post_attention_layernorm.weight",), (("hidden",),)),
)  # fmt: skip

#: Grouped-query attention of the dense architectures.
GQA = (
    Row(("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"), ("input_layernorm.weight",), (("hidden",),)),
    Row(("self_attention.linear_qkv.weight",), ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        (("heads*dim", "hidden"), ("groups*dim", "hidden"), ("groups*dim", "hidden")), Split.QKV),
    Row(("self_attention.linear_qkv.bias",), ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        (("heads*dim",), ("groups*dim",), ("groups*dim",)), Split.QKV, "qkv bias"),
    Row(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), (("hidden", "heads*dim"),), Split.ROW),
    Row(("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"), ("post_attention_layernorm.weight",), (("hidden",),)),
)  # fmt: skip

DENSE = (
    Row(("mlp.linear_fc1.weight",), ("mlp.gate_proj.weight", "mlp.up_proj.weight"), (("ffn", "hidden"),) * 2, Split.GLU),
    Row(("mlp.linear_fc2.weight",), ("mlp.down_proj.weight",), (("hidden", "ffn"),), Split.ROW),
)

MOE = (
    Row(("mlp.router.weight",), ("mlp.gate.weight",), (("experts", "hidden"),)),
    Row(("mlp.router.expert_bias",), ("mlp.gate.e_score_correction_bias",), (("experts",),)),
    Row(("mlp.shared_experts.linear_fc1.weight",), ("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
        (("shared_ffn", "hidden"),) * 2, Split.GLU, "shared experts"),
    Row(("mlp.shared_experts.linear_fc2.weight",), ("mlp.shared_experts.down_proj.weight",), (("hidden", "shared_ffn"),),
        Split.ROW, "shared experts"),
    Row(("mlp.experts.local_experts.{e}.linear_fc1.weight", "mlp.experts.linear_fc1.weight{e}"),
        ("mlp.experts.{e}.gate_proj.weight", "mlp.experts.{e}.up_proj.weight"), (("expert_ffn", "hidden"),) * 2, Split.GLU),
    Row(("mlp.experts.local_experts.{e}.linear_fc2.weight", "mlp.experts.linear_fc2.weight{e}"),
        ("mlp.experts.{e}.down_proj.weight",), (("hidden", "expert_ffn"),), Split.ROW),
)  # fmt: skip

#: Multi-token prediction around its transformer layer; Megatron's prefix is `mtp.layers.{k}.`.
#: `eh_proj` takes the embedding first, then the hidden state, in both.
MTP = (
    Row(("enorm.weight",), ("enorm.weight",), (("hidden",),)),
    Row(("hnorm.weight",), ("hnorm.weight",), (("hidden",),)),
    Row(("eh_proj.weight",), ("eh_proj.weight",), (("hidden", "2*hidden"),), Split.COLUMN),
    Row(("final_layernorm.weight",), ("shared_head.norm.weight",), (("hidden",),)),
)

SCORE_HEAD = "score.weight"  #: a reward model's, in transformers' classifiers

LAST = (
    Row(("decoder.final_layernorm.weight",), ("model.norm.weight",), (("hidden",),)),
    Row(("output_layer.weight",), ("lm_head.weight",), (("vocab", "hidden"),), Split.VOCAB, "untied language model"),
    Row(("output_layer.weight",), (SCORE_HEAD,), (("one", "hidden"),), when="reward model"),
)

#: Published checkpoints repeat these in every multi-token-prediction layer; Megatron shares them.
MTP_COPIES = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}


@dataclass(frozen=True)
class Entry:
    """One tensor of one model: a row with its layer and expert filled in. Numbers are global."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]  #: of each Hugging Face tensor
    split: Split
    expert: int | None  #: global expert number
    copies: tuple[str, ...] = ()  #: further Hugging Face names of the same values
    query_groups: int = 1  #: of Split.QKV

    @property
    def name(self) -> str:
        """How messages call it."""
        return self.hf[0]

    @property
    def hf_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of its Hugging Face tensors, copies included."""
        return dict(zip(self.hf, self.shapes, strict=True)) | dict.fromkeys(self.copies, self.shapes[0])

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Of the Megatron tensor before any split: all Hugging Face tensors in one, the vocabulary without padding."""
        return (sum(shape[0] for shape in self.shapes), *self.shapes[0][1:])


def model_entries(arch: Architecture) -> list[Entry]:
    """Every weight of the model once, in streaming order."""
    attention = GQA if isinstance(arch, DenseArchitecture) else MLA
    moe_layers = [n >= arch.first_k_dense_replace for n in range(arch.num_hidden_layers)]
    entries = _entries(arch, FIRST, "", "")
    for n, is_moe in enumerate(moe_layers):
        entries += _entries(arch, attention + (MOE if is_moe else DENSE), f"decoder.layers.{n}.", f"model.layers.{n}.")
    for k in range(arch.num_nextn_predict_layers):
        hf = f"model.layers.{arch.num_hidden_layers + k}."
        entries += _entries(arch, MTP, f"mtp.layers.{k}.", hf)
        entries += _entries(arch, attention + MOE, f"mtp.layers.{k}.transformer_layer.", hf)
    return entries + _entries(arch, LAST, "", "")


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of an exported folder, in streaming order."""
    return {name: shape for entry in model_entries(arch) for name, shape in entry.hf_shapes.items()}


def _entries(arch: Architecture, rows: tuple[Row, ...], megatron: str, hf: str) -> list[Entry]:
    sizes, conditions = _sizes(arch), _conditions(arch)
    entries = []
    plain = [row for row in rows if not row.is_expert and conditions[row.when]]
    experts = [row for row in rows if row.is_expert]
    for row in plain:
        entries.append(_entry(arch, row, sizes, megatron, hf, None))
    for e in range(arch.n_routed_experts if experts else 0):
        entries += [_entry(arch, row, sizes, megatron, hf, e) for row in experts]
    return entries


def _entry(arch: Architecture, row: Row, sizes: dict[str, int], megatron: str, hf: str, expert: int | None) -> Entry:
    def fill(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(prefix + name.replace("{e}", str(expert)) for name in names)

    names = fill(hf, row.hf)
    copy = MTP_COPIES.get(names[0])
    layers = range(arch.num_hidden_layers, arch.num_hidden_layers + arch.num_nextn_predict_layers)
    return Entry(
        megatron=fill(megatron, row.megatron),
        hf=names,
        shapes=tuple(tuple(sizes[word] for word in shape) for shape in row.shapes),
        split=row.split,
        expert=expert,
        copies=tuple(f"model.layers.{n}.{copy}" for n in layers) if copy else (),
        query_groups=arch.num_key_value_heads if row.split is Split.QKV else 1,
    )


def _sizes(arch: Architecture) -> dict[str, int]:
    common = {
        "one": 1,
        "vocab": arch.vocab_size,
        "hidden": arch.hidden_size,
        "2*hidden": 2 * arch.hidden_size,
        "ffn": arch.intermediate_size,
    }
    heads = arch.num_attention_heads
    if isinstance(arch, DenseArchitecture):
        return common | {"heads*dim": heads * arch.head_dim, "groups*dim": arch.num_key_value_heads * arch.head_dim}
    nope, rope, v = arch.qk_nope_head_dim, arch.qk_rope_head_dim, arch.v_head_dim
    return common | {
        "heads*qk": heads * (nope + rope),
        "q_lora": arch.q_lora_rank or 0,
        "kv_lora": arch.kv_lora_rank,
        "kv_lora+rope": arch.kv_lora_rank + rope,
        "heads*(nope+v)": heads * (nope + v),
        "heads*v": heads * v,
        "experts": arch.n_routed_experts,
        "expert_ffn": arch.moe_intermediate_size,
        "shared_ffn": arch.n_shared_experts * arch.moe_intermediate_size,
    }


def _conditions(arch: Architecture) -> dict[str, bool]:
    compressed = getattr(arch, "q_lora_rank", None) is not None
    return {
        "always": True,
        "tied": arch.tie_word_embeddings,
        "untied": not arch.tie_word_embeddings,
        "untied language model": not arch.tie_word_embeddings and not arch.is_reward_model,
        "reward model": arch.is_reward_model,
        "full query": not compressed,
        "query compression": compressed,
        "shared experts": arch.n_shared_experts > 0,
        "qkv bias": isinstance(arch, DenseArchitecture) and arch.QKV_BIAS,
    }
