"""Grouped-query attention, which dense families share: neighbouring query heads share a key and a value head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Row, Split, norm_row


class GroupedQueryArchitecture(Architecture):
    """A model with grouped-query attention, dense unless its family says otherwise."""

    ATTENTION: ClassVar[Literal["grouped_query", "latent"]] = "grouped_query"
    QKV_BIAS: ClassVar[bool] = False  #: whether the query, key and value projections have a bias
    VLLM_FUSED: ClassVar[dict[str, tuple[str, ...]]] = {**Architecture.VLLM_FUSED, "qkv_proj": ("q_proj", "k_proj", "v_proj")}

    num_key_value_heads: int = Field(gt=0, description="query groups of grouped-query attention")
    head_dim: int = Field(gt=0, description="width of one head")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        fields = {"num_key_value_heads": heads} | fields
        is_open = fields.get("head_dim") is None and cls.model_fields["head_dim"].is_required()
        if is_open and isinstance(heads, int) and heads > 0 and isinstance(hidden, int):
            fields |= {"head_dim": hidden // heads}
        return fields

    @model_validator(mode="after")
    def _check(self) -> GroupedQueryArchitecture:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads={self.num_key_value_heads} does not divide num_attention_heads={self.num_attention_heads}"
            )
        return self

    @property
    def query_groups(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads

    def megatron_settings(self) -> dict[str, Any]:
        """Heads and biases; the base of RoPE is given to the model."""
        return {"num_query_groups": self.num_key_value_heads, "kv_channels": self.head_dim, "add_qkv_bias": self.QKV_BIAS}

    def attention_rows(self) -> tuple[Row, ...]:
        """Both norms, the fused projection of query, key and value, its bias if there is one, and the output projection."""
        hidden, queries, groups = self.hidden_size, self.num_attention_heads * self.head_dim, self.num_key_value_heads
        keys = groups * self.head_dim
        bias = Row(
            ("self_attention.linear_qkv.bias",), ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
            ((queries,), (keys,), (keys,)), Split.QKV, groups,
        )  # fmt: skip
        return (
            norm_row("input_layernorm.weight", hidden, "self_attention.linear_qkv.layer_norm_weight"),
            Row(("self_attention.linear_qkv.weight",),
                ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
                ((queries, hidden), (keys, hidden), (keys, hidden)), Split.QKV, groups),
            *([bias] if self.QKV_BIAS else []),
            Row(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), ((hidden, queries),), Split.ROW),
            norm_row("pre_mlp_layernorm.weight", hidden, "mlp.linear_fc1.layer_norm_weight", hf="post_attention_layernorm.weight"),
        )  # fmt: skip
