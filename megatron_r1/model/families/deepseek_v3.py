"""The DeepSeek-V3 architecture as plain data: V3, R1, Kimi K2, Moonlight, and V2-Lite's shape with V3's router.

Source: DeepSeek-V3 technical report (arXiv 2412.19437) sections 2.1 to 2.2 and the published config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from megatron_r1.model.architecture import MOST_LAYERS, Architecture, RouterRule
from megatron_r1.model.latent_attention import LatentAttentionArchitecture, LatentYarnScaling
from megatron_r1.model.rows import Block, Row, Split, norm_row


class DeepseekV3(LatentAttentionArchitecture):
    """Multi-head latent attention, DeepSeekMoE with biased group-limited routing, multi-token prediction."""

    HF_CLASS: ClassVar[str] = "DeepseekV3ForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {
        "scoring_func": "sigmoid", "topk_method": "noaux_tc", **LatentAttentionArchitecture.HF_FIXED, "rope_interleave": True,
    }  # fmt: skip
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {
        "q_lora_rank": 1536, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4, "routed_scaling_factor": 2.5,
    }  # fmt: skip
    HF_NULL: ClassVar[dict[str, Any]] = {**LatentAttentionArchitecture.HF_NULL, "num_nextn_predict_layers": 0}
    HF_SPELLINGS: ClassVar[dict[str, str]] = {"num_mtp_layers": "num_nextn_predict_layers"}
    ALSO_KNOWN_AS: ClassVar[tuple[str, ...]] = ("kimi_k2",)
    HAS_FP8: ClassVar[bool] = True
    ROUTER_BIAS: ClassVar[bool] = True
    REWARD_MODEL_FIELDS: ClassVar[dict[str, Any]] = {**Architecture.REWARD_MODEL_FIELDS, "num_nextn_predict_layers": 0}

    model_type: Literal["deepseek_v3"] = "deepseek_v3"
    num_nextn_predict_layers: int = Field(0, ge=0, le=MOST_LAYERS, description="multi-token prediction depth D (V3 section 2.2)")
    norm_topk_prob: bool = True

    @property
    def mtp_depth(self) -> int:
        """D of V3 section 2.2."""
        return self.num_nextn_predict_layers

    def as_stored(self, names: Iterable[str]) -> Self:
        """Without multi-token prediction if none of it is there: transformers drops it and leaves the number in config.json."""
        prefixes = tuple(f"model.layers.{self.num_hidden_layers + k}." for k in range(self.num_nextn_predict_layers))
        if not prefixes or any(name.startswith(prefixes) for name in names):
            return self
        return self.model_copy(update={"num_nextn_predict_layers": 0})

    def megatron_settings(self) -> dict[str, Any]:
        """Sigmoid scores, biased selection, unbiased weights (V3 section 2.1)."""
        return super().megatron_settings() | {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}

    def router_rule(self) -> RouterRule:
        """A group's score is that of its best two; Megatron-Core's is that of its best topk / group_topk."""
        one = self.num_experts_per_tok == 1 and self.norm_topk_prob
        counted = self.num_experts_per_tok // self.topk_group
        return RouterRule(best_of_group=2 if self.n_group > 1 and counted != 2 else None, normalize_one=one)

    def megatron_refusal(self) -> str | None:
        """Routers that Megatron-Core 0.16.1 computes differently."""
        if self.n_group > 1 and self.n_routed_experts < 2 * self.n_group:
            return f"n_group={self.n_group} of n_routed_experts={self.n_routed_experts}: a group is scored by its best two experts"
        if not self.norm_topk_prob and self.num_experts_per_tok > 1:
            return "norm_topk_prob=false: Megatron-Core always normalises sigmoid routing weights"
        return None

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
        max_position_embeddings=163840, rope_scaling=LatentYarnScaling(mscale=0.707, mscale_all_dim=0.707), n_routed_experts=64,
        n_shared_experts=2, moe_intermediate_size=1408, num_experts_per_tok=6,
    ),
    # DeepSeek-V3 and DeepSeek-R1.
    "671b": DeepseekV3(
        vocab_size=129280, hidden_size=7168, num_hidden_layers=61, first_k_dense_replace=3, num_nextn_predict_layers=1,
        intermediate_size=18432, num_attention_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128,
        qk_rope_head_dim=64, v_head_dim=128, max_position_embeddings=163840, rope_scaling=LatentYarnScaling(),
        n_routed_experts=256, n_shared_experts=1, moe_intermediate_size=2048, num_experts_per_tok=8, n_group=8, topk_group=4,
        routed_scaling_factor=2.5,
    ),
}  # fmt: skip
