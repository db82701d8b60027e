"""Grouped-query attention, which dense families share: neighbouring query heads share a key and a value head."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from megatron_r1.model.architecture import MOST_HEADS, Architecture
from megatron_r1.model.rope import Llama3Scaling, YarnScaling, read_llama3, read_yarn
from megatron_r1.model.rows import Row, Split, norm_row


class GroupedQueryArchitecture(Architecture):
    """A model with grouped-query attention, dense unless its family says otherwise."""

    ATTENTION: ClassVar[Literal["grouped_query", "latent"]] = "grouped_query"
    HF_NULL: ClassVar[dict[str, Any]] = {"num_key_value_heads": None}
    QKV_BIAS: ClassVar[bool] = False  #: whether the query, key and value projections have a bias
    QK_NORM: ClassVar[bool] = False  #: whether every head's query and key have an RMSNorm before RoPE, as in Qwen3
    VLLM_FUSED: ClassVar[dict[str, tuple[str, ...]]] = {**Architecture.VLLM_FUSED, "qkv_proj": ("q_proj", "k_proj", "v_proj")}

    num_key_value_heads: int = Field(gt=0, le=MOST_HEADS, description="query groups of grouped-query attention")
    head_dim: int = Field(gt=0, le=MOST_HEADS, description="width of one head")
    rope_scaling: YarnScaling | Llama3Scaling | None = None

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, fields: dict[str, Any]) -> dict[str, Any]:
        heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
        if fields.get("num_key_value_heads") is None:
            fields = fields | {"num_key_value_heads": heads}
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
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} is odd, RoPE turns pairs")
        return self

    @property
    def query_groups(self) -> int:
        """Key and value heads."""
        return self.num_key_value_heads

    @property
    def cached_width(self) -> int:
        """A key and a value of every group."""
        return 2 * self.num_key_value_heads * self.head_dim

    def head_widths(self) -> tuple[int, int]:
        """All the same."""
        return self.head_dim, self.head_dim

    def megatron_settings(self) -> dict[str, Any]:
        """Heads, biases and norms; RoPE is given to the model."""
        return {
            "num_query_groups": self.num_key_value_heads, "kv_channels": self.head_dim, "add_qkv_bias": self.QKV_BIAS,
            "qk_layernorm": self.QK_NORM,
        }  # fmt: skip

    def rope_wavelength_scaling(self) -> dict[str, Any] | None:
        """All four numbers of Llama 3's; Megatron-Core's own switch would take only the factor."""
        scaling = self.rope_scaling
        return scaling.model_dump(exclude={"rope_type"}) if isinstance(scaling, Llama3Scaling) else None

    def yarn_scaling(self) -> dict[str, Any] | None:
        """YaRN over the whole head."""
        scaling = self.rope_scaling
        return scaling.model_dump(exclude={"rope_type"}) if isinstance(scaling, YarnScaling) else None

    @classmethod
    def read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """YaRN or Llama 3's, in any family, as in transformers and vLLM."""
        if kind == "llama3":
            return read_llama3(scaling)
        if kind != "yarn":
            model_type = cls.model_fields["model_type"].default
            raise ValueError(f"rope_scaling is of type {kind!r}, {model_type} is built with 'yarn', 'llama3' or none only")
        fields = read_yarn(scaling)
        if "mscale" in fields:
            raise ValueError("rope_scaling sets mscale and mscale_all_dim, which only latent attention is built with: drop both")
        return {"rope_type": "yarn", **fields}

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
            *(self._head_norm_rows() if self.QK_NORM else ()),
            Row(("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), ((hidden, queries),), Split.ROW),
            norm_row("pre_mlp_layernorm.weight", hidden, "mlp.linear_fc1.layer_norm_weight", hf="post_attention_layernorm.weight"),
        )  # fmt: skip

    def _head_norm_rows(self) -> tuple[Row, ...]:
        """One norm for all query heads and one for all key heads."""
        return (
            norm_row("self_attention.q_layernorm.weight", self.head_dim, hf="self_attn.q_norm.weight"),
            norm_row("self_attention.k_layernorm.weight", self.head_dim, hf="self_attn.k_norm.weight"),
        )
