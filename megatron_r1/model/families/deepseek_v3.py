"""The DeepSeek-V3 architecture as plain data: V3, R1, and V2-Lite's shape with V3's router.

Source: DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1 to 2.2 and the published config.json.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_r1.model.architecture import Architecture, Experts
from megatron_r1.model.rows import Block, Row, Split, expert_rows, norm_row, swiglu_rows


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
    ATTENTION: ClassVar[Literal["grouped_query", "latent"]] = "latent"
    HAS_FP8: ClassVar[bool] = True
    VLLM_FUSED: ClassVar[dict[str, tuple[str, ...]]] = {
        **Architecture.VLLM_FUSED, "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    }  # fmt: skip
    REWARD_MODEL_FIELDS: ClassVar[dict[str, Any]] = {**Architecture.REWARD_MODEL_FIELDS, "num_nextn_predict_layers": 0}

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
    def experts(self) -> Experts:
        """In every layer but the first few."""
        return Experts(self.n_routed_experts, self.moe_intermediate_size, self.n_shared_experts * self.moe_intermediate_size)

    def is_moe_layer(self, layer: int) -> bool:
        """All layers after the leading dense ones, those of multi-token prediction included."""
        return layer >= self.first_k_dense_replace

    @property
    def mtp_depth(self) -> int:
        """D of V3 section 2.2."""
        return self.num_nextn_predict_layers

    def megatron_settings(self) -> dict[str, Any]:
        """Attention with decoupled, interleaved RoPE; sigmoid scores, biased selection, unbiased weights (V3 section 2.1)."""
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
            "moe_router_score_function": "sigmoid",
            "moe_router_topk_scaling_factor": self.routed_scaling_factor,
            "moe_router_enable_expert_bias": True,
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

    def megatron_refusal(self) -> str | None:
        """Routers that Megatron-Core 0.16.1 computes differently."""
        best = self.num_experts_per_tok // self.topk_group
        if self.n_group > 1 and best != 2:
            return (
                f"num_experts_per_tok={self.num_experts_per_tok} over topk_group={self.topk_group}: Megatron-Core scores a group "
                f"by its best {best} experts, DeepSeek-V3 by its best 2; choose num_experts_per_tok = 2 x topk_group"
            )
        if not self.norm_topk_prob:
            return "norm_topk_prob=false: Megatron-Core always normalises sigmoid routing weights"
        return None

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
        """Router with its bias, shared experts and routed experts."""
        if not self.is_moe_layer(layer):
            return super().feed_forward_rows(layer)
        hidden, count, shared = self.hidden_size, self.n_routed_experts, self.experts.shared_width
        return (
            Row(("mlp.router.weight",), ("mlp.gate.weight",), ((count, hidden),)),
            Row(("mlp.router.expert_bias",), ("mlp.gate.e_score_correction_bias",), ((count,),)),
            *(swiglu_rows(hidden, shared, "mlp.shared_experts.", "mlp.shared_experts.") if shared else ()),
            *expert_rows(hidden, self.moe_intermediate_size),
        )

    def mtp_blocks(self) -> Iterator[Block]:
        """Around a layer of multi-token prediction stand norms and a projection, of the embedding first, then the hidden state."""
        hidden = self.hidden_size
        around = (
            norm_row("enorm.weight", hidden),
            norm_row("hnorm.weight", hidden),
            Row(("eh_proj.weight",), ("eh_proj.weight",), ((hidden, 2 * hidden),), Split.COLUMN),
            norm_row("final_layernorm.weight", hidden, hf="shared_head.norm.weight"),
        )
        for k in range(self.num_nextn_predict_layers):
            layer = self.num_hidden_layers + k
            yield Block(f"mtp.layers.{k}.", f"model.layers.{layer}.", around)
            rows = self.attention_rows() + self.feed_forward_rows(layer)
            yield Block(f"mtp.layers.{k}.transformer_layer.", f"model.layers.{layer}.", rows)

    def embedding_copies(self, name: str) -> tuple[str, ...]:
        """Published checkpoints repeat both in every layer of multi-token prediction; Megatron-Core shares them."""
        copy = {"model.embed_tokens.weight": "embed_tokens.weight", "lm_head.weight": "shared_head.head.weight"}[name]
        layers = range(self.num_hidden_layers, self.num_hidden_layers + self.num_nextn_predict_layers)
        return tuple(f"model.layers.{n}.{copy}" for n in layers)

    def vllm_split_sizes(self) -> dict[str, int]:
        """Those of a dense model, and of the experts."""
        return {**super().vllm_split_sizes(), "moe_intermediate_size": self.moe_intermediate_size}

    def to_hf_config(self, bos_token_id: int, eos_token_id: int, dtype: str) -> dict[str, Any]:
        """The `config.json` that transformers and vLLM load (dtype: "float32" or "bfloat16")."""
        config = super().to_hf_config(bos_token_id, eos_token_id, dtype)
        return config | {"num_key_value_heads": self.query_groups}

    @classmethod
    def read_rope_scaling(cls, kind: str, scaling: dict[str, Any]) -> dict[str, Any]:
        """YaRN only."""
        if kind != "yarn":
            raise ValueError(f"rope_scaling is of type {kind!r}, deepseek_v3 has 'yarn' only")
        return {**{k: v for k, v in scaling.items() if k in RopeScaling.model_fields}, "type": kind}


FAMILY = DeepseekV3
PRESETS = {
    # kv_lora_rank 512 with RoPE 64 is the one MLA shape that vLLM's CPU backend serves in fp32.
    # rope_theta 100: sequences are under 64 tokens. init_std 0.08: 0.006 at hidden size 128 learns several times slower.
    "tiny": DeepseekV3(
        vocab_size=448, hidden_size=128, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=256,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32,
        max_position_embeddings=1024, rope_theta=100.0, n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=64,
        num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, init_std=0.08,
    ),
    # About 100 M parameters, every part of the architecture on.
    "small": DeepseekV3(
        vocab_size=32000, hidden_size=512, num_hidden_layers=8, first_k_dense_replace=1, num_nextn_predict_layers=1,
        intermediate_size=2048, num_attention_heads=8, q_lora_rank=384, kv_lora_rank=512, qk_nope_head_dim=64,
        qk_rope_head_dim=64, v_head_dim=64, max_position_embeddings=4096, n_routed_experts=16, n_shared_experts=1,
        moe_intermediate_size=256, num_experts_per_tok=4, n_group=4, topk_group=2, routed_scaling_factor=2.5,
    ),
    # The shape of DeepSeek-V2-Lite (16 B parameters, 2.4 B active) with V3's router.
    "16b": DeepseekV3(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, intermediate_size=10944,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=163840, rope_scaling=RopeScaling(mscale=0.707, mscale_all_dim=0.707), n_routed_experts=64,
        n_shared_experts=2, moe_intermediate_size=1408, num_experts_per_tok=6,
    ),
    # DeepSeek-V3 and DeepSeek-R1.
    "671b": DeepseekV3(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, num_nextn_predict_layers=1,
        intermediate_size=18432, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=163840, rope_scaling=RopeScaling(),
        n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048, num_experts_per_tok=8, n_group=8, topk_group=4,
        routed_scaling_factor=2.5,
    ),
}  # fmt: skip
