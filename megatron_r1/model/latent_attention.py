"""Latent attention with experts (DeepSeek-V2 section 2), which deepseek_v2 and deepseek_v3 share.

Sources: DeepSeek-V2 (arXiv 2405.04434) and DeepSeek-V3 (arXiv 2412.19437) technical reports, the published config.json files.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_r1.model.architecture import MOST_EXPERTS, MOST_HEADS, MOST_WIDTH, Architecture, Experts
from megatron_r1.model.rope import MOST_POSITIONS, read_yarn
from megatron_r1.model.rows import Row, Split, expert_rows, norm_row, swiglu_rows


class LatentYarnScaling(BaseModel):
    """YaRN, applied to the decoupled RoPE key only (V3 section 4.3: s=40, alpha=1, beta=32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["yarn"] = "yarn"
    factor: float = Field(40.0, gt=0, le=1e4)
    original_max_position_embeddings: int = Field(4096, gt=0, le=MOST_POSITIONS)
    beta_fast: float = Field(32.0, gt=0, allow_inf_nan=False)
    beta_slow: float = Field(1.0, gt=0, allow_inf_nan=False)
    mscale: float = Field(1.0, ge=0, allow_inf_nan=False)
    mscale_all_dim: float = Field(1.0, ge=0, allow_inf_nan=False, description="0: the softmax is not scaled")


class LatentAttentionArchitecture(Architecture):
    """Multi-head latent attention and DeepSeekMoE; scores and their selection are the family's."""

    ATTENTION: ClassVar[Literal["grouped_query", "latent"]] = "latent"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1}
    HF_NULL: ClassVar[dict[str, Any]] = {"q_lora_rank": None, "n_shared_experts": 0, "n_group": 1, "topk_group": 1}
    VLLM_FUSED: ClassVar[dict[str, tuple[str, ...]]] = {
        **Architecture.VLLM_FUSED, "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }  # fmt: skip
    ROUTER_BIAS: ClassVar[bool]  #: whether selection adds a bias that balances the experts

    first_k_dense_replace: int = Field(1, ge=0, description="leading layers with a dense feed-forward")

    q_lora_rank: int | None = Field(None, gt=0, le=MOST_WIDTH, description="query compression; None: a full query projection")
    kv_lora_rank: int = Field(gt=0, le=MOST_WIDTH)
    qk_nope_head_dim: int = Field(gt=0, le=MOST_HEADS)
    qk_rope_head_dim: int = Field(gt=0, le=MOST_HEADS, multiple_of=2, description="decoupled RoPE dimension per head")
    v_head_dim: int = Field(gt=0, le=MOST_HEADS)
    rope_scaling: LatentYarnScaling | None = None

    n_routed_experts: int = Field(gt=0, le=MOST_EXPERTS)
    n_shared_experts: int = Field(1, ge=0, le=MOST_EXPERTS)
    moe_intermediate_size: int = Field(gt=0, le=MOST_WIDTH, description="width of one expert")
    num_experts_per_tok: int = Field(gt=0, le=MOST_EXPERTS)
    n_group: int = Field(1, gt=0, le=MOST_EXPERTS, description="expert groups of group-limited routing")
    topk_group: int = Field(1, gt=0, le=MOST_EXPERTS, description="groups a token may use")
    routed_scaling_factor: float = Field(1.0, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.n_routed_experts % self.n_group:
            raise ValueError(f"n_group={self.n_group} does not divide n_routed_experts={self.n_routed_experts}")
        if self.topk_group > self.n_group:
            raise ValueError(f"topk_group={self.topk_group} is more than n_group={self.n_group}")
        usable = self.topk_group * self.n_routed_experts // self.n_group
        if self.num_experts_per_tok > usable:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than the {usable} experts a token may use")
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError("first_k_dense_replace is more than num_hidden_layers")
        if self.tie_word_embeddings:
            raise ValueError(f"tie_word_embeddings is true, a {self.model_type} with tied embeddings does not exist")
        return self

    @property
    def experts(self) -> Experts:
        """In every layer but the first few."""
        shared = self.n_shared_experts * self.moe_intermediate_size
        return Experts(self.n_routed_experts, self.moe_intermediate_size, self.num_experts_per_tok, shared)

    def is_moe_layer(self, layer: int) -> bool:
        """All layers after the leading dense ones, those of multi-token prediction included."""
        return layer >= self.first_k_dense_replace

    @property
    def cached_width(self) -> int:
        """The compressed row of keys and values, and the key that RoPE turns."""
        return self.kv_lora_rank + self.qk_rope_head_dim

    def head_widths(self) -> tuple[int, int]:
        """Query and key have a part with positions and one without."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim, self.v_head_dim

    def megatron_settings(self) -> dict[str, Any]:
        """Attention with decoupled, interleaved RoPE; how many experts of how many groups. Scores are the family's."""
        grouped = self.n_group > 1
        settings: dict[str, Any] = {
            "multi_latent_attention": True,
            "qk_layernorm": True,
            "q_lora_rank": self.q_lora_rank,
            "kv_lora_rank": self.kv_lora_rank,
            "qk_head_dim": self.qk_nope_head_dim,
            "qk_pos_emb_head_dim": self.qk_rope_head_dim,
            "v_head_dim": self.v_head_dim,
            "rotary_base": self.rope_theta,
            "moe_router_topk": self.num_experts_per_tok,
            "moe_router_num_groups": self.n_group if grouped else None,
            "moe_router_group_topk": self.topk_group if grouped else None,
            "moe_router_topk_scaling_factor": self.routed_scaling_factor,
        }
        scaling = self.rope_scaling
        if scaling is None:
            # rotary_scaling_factor 1 also makes MLA's softmax scale the plain 1 / sqrt(head width).
            return settings | {"rope_type": "rope", "rotary_scaling_factor": 1.0}
        return settings | {
            "rope_type": "yarn",
            "rotary_scaling_factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position_embeddings,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }

    def split_sizes(self) -> dict[str, dict[str, int]]:
        """Those of a dense model, and of the experts."""
        sizes = super().split_sizes()
        sizes["tp"]["the shared experts' width"] = self.experts.shared_width
        return sizes | {
            "ep": {"n_routed_experts": self.n_routed_experts}, "etp": {"moe_intermediate_size": self.moe_intermediate_size},
        }  # fmt: skip

    def attention_rows(self) -> tuple[Row, ...]:
        """Multi-head latent attention. Megatron-Core undoes the interleaving of RoPE itself, so no rows are permuted."""
        hidden, heads = self.hidden_size, self.num_attention_heads
        queries = heads * (self.qk_nope_head_dim + self.qk_rope_head_dim)
        return (
            norm_row("input_layernorm.weight", hidden, "self_attention.linear_q_proj.layer_norm_weight"),
            *self._query_rows(queries),
            Row(("self_attention.linear_kv_down_proj.weight",), ("self_attn.kv_a_proj_with_mqa.weight",),
                ((self.kv_lora_rank + self.qk_rope_head_dim, hidden),)),
            norm_row("self_attention.kv_layernorm.weight", self.kv_lora_rank, "self_attention.linear_kv_up_proj.layer_norm_weight",
                     hf="self_attn.kv_a_layernorm.weight"),
            Row(("self_attention.linear_kv_up_proj.weight",), ("self_attn.kv_b_proj.weight",),
                ((heads * (self.qk_nope_head_dim + self.v_head_dim), self.kv_lora_rank),), Split.COLUMN),
            Row(
                ("self_attention.linear_proj.weight",), ("self_attn.o_proj.weight",), ((hidden, heads * self.v_head_dim),),
                Split.ROW,
            ),
            norm_row("pre_mlp_layernorm.weight", hidden, "mlp.linear_fc1.layer_norm_weight", hf="post_attention_layernorm.weight"),
        )  # fmt: skip

    def _query_rows(self, queries: int) -> tuple[Row, ...]:
        rank = self.q_lora_rank
        if rank is None:
            full = ((queries, self.hidden_size),)
            return (Row(("self_attention.linear_q_proj.weight",), ("self_attn.q_proj.weight",), full, Split.COLUMN),)
        return (
            Row(("self_attention.linear_q_down_proj.weight",), ("self_attn.q_a_proj.weight",), ((rank, self.hidden_size),)),
            norm_row("self_attention.q_layernorm.weight", rank, "self_attention.linear_q_up_proj.layer_norm_weight",
                     hf="self_attn.q_a_layernorm.weight"),
            Row(("self_attention.linear_q_up_proj.weight",), ("self_attn.q_b_proj.weight",), ((queries, rank),), Split.COLUMN),
        )  # fmt: skip

    def feed_forward_rows(self, layer: int) -> tuple[Row, ...]:
        """Router, with its bias where it has one, shared experts and routed experts."""
        if not self.is_moe_layer(layer):
            return super().feed_forward_rows(layer)
        hidden, count, shared = self.hidden_size, self.n_routed_experts, self.experts.shared_width
        return (
            Row(("mlp.router.weight",), ("mlp.gate.weight",), ((count, hidden),)),
            *([Row(("mlp.router.expert_bias",), ("mlp.gate.e_score_correction_bias",), ((count,),))] if self.ROUTER_BIAS else []),
            *(swiglu_rows(hidden, shared, "mlp.shared_experts.", "mlp.shared_experts.") if shared else ()),
            *expert_rows(hidden, self.moe_intermediate_size),
        )

    def vllm_split_sizes(self) -> dict[str, int]:
        """Those of a dense model, and of the experts."""
        return {**super().vllm_split_sizes(), "moe_intermediate_size": self.moe_intermediate_size}

    def vllm_refusal(self) -> str | None:
        """Without shared experts transformers reads a 0 only, of which vLLM makes shared experts of width 0."""
        if self.n_shared_experts == 0:
            return "n_shared_experts=0: vLLM cannot be given a model without shared experts; train it without rollouts"
        return None

    def to_hf_config(self, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load (dtype: "float32" or "bfloat16")."""
        config = super().to_hf_config(bos_token_id, eos_token_id, dtype)
        return config | {"num_key_value_heads": self.query_groups}

    @classmethod
    def read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """YaRN only. Without `mscale_all_dim` the softmax is not scaled, without either sine and cosine are by the factor alone."""
        if kind != "yarn":
            model_type = cls.model_fields["model_type"].default
            raise ValueError(f"rope_scaling is of type {kind!r}, {model_type} is built with 'yarn' or none only")
        return {"mscale": 1.0, "mscale_all_dim": 0.0, **read_yarn(scaling), "type": kind}
