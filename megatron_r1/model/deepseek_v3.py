"""The DeepSeek-V3 architecture as plain data: V3, R1, and V2-Lite's shape with V3's router.

Source: DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1 to 2.2 and the published config.json.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_r1.model.architecture import Architecture


class RopeScaling(BaseModel):
    """YaRN, applied to the decoupled RoPE key only (V3 section 4.3: s=40, alpha=1, beta=32)."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    type: Literal["yarn"] = "yarn"
    factor: float = 40.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 1.0


class DeepseekV3(Architecture):
    """Multi-head latent attention, DeepSeekMoE with biased group-limited routing, multi-token prediction."""

    HF_CLASS: ClassVar[str] = "DeepseekV3ForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", "hidden_act": "silu", "attention_bias": False, "moe_layer_freq": 1,
        "rope_interleave": True,
    }  # fmt: skip

    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    first_k_dense_replace: int = Field(1, ge=0, description="leading layers with a dense feed-forward")
    num_nextn_predict_layers: int = Field(0, ge=0, description="multi-token prediction depth D (V3 section 2.2)")

    q_lora_rank: int | None = Field(None, description="query compression; None: a full query projection")
    kv_lora_rank: int = Field(gt=0)
    qk_nope_head_dim: int = Field(gt=0)
    qk_rope_head_dim: int = Field(gt=0, description="decoupled RoPE dimension per head")
    v_head_dim: int = Field(gt=0)
    rope_scaling: RopeScaling | None = None

    n_routed_experts: int = Field(gt=0)
    n_shared_experts: int = Field(1, ge=0)
    moe_intermediate_size: int = Field(gt=0, description="width of one expert")
    num_experts_per_tok: int = Field(gt=0)
    n_group: int = Field(1, gt=0, description="expert groups of group-limited routing")
    topk_group: int = Field(1, gt=0, description="groups a token may use")
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True

    @model_validator(mode="after")
    def _check(self) -> DeepseekV3:
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
            raise ValueError("deepseek_v3 with tied embeddings does not exist")
        return self

    @property
    def qk_head_dim(self) -> int:
        """Query and key width per head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def num_key_value_heads(self) -> int:
        """As many as query heads: MLA expands its latent to all of them."""
        return self.num_attention_heads

    def to_hf_config(self, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load (dtype: "float32" or "bfloat16")."""
        config = super().to_hf_config(bos_token_id, eos_token_id, dtype)
        return config | {"num_key_value_heads": self.num_key_value_heads}

    @classmethod
    def _read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        if kind != "yarn":
            raise ValueError(f"rope_scaling is of type {kind!r}, deepseek_v3 has 'yarn' only")
        return {**{k: v for k, v in scaling.items() if k in RopeScaling.model_fields}, "type": kind}
