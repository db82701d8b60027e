"""DeepSeek-V2 and V2-Lite: softmax scores whose selected ones are the weights, without a bias.

Sources: DeepSeek-V2 technical report (arXiv 2405.04434), the published config.json files, transformers' `DeepseekV2ForCausalLM`.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from megatron_r1.model.architecture import RouterRule
from megatron_r1.model.latent_attention import LatentAttentionArchitecture, LatentYarnScaling


class DeepseekV2(LatentAttentionArchitecture):
    """Multi-head latent attention, DeepSeekMoE with softmax scores, over all experts or the best groups."""

    HF_CLASS: ClassVar[str] = "DeepseekV2ForCausalLM"
    #: Of normalised weights transformers makes no use, and vLLM scales them otherwise than the published code.
    HF_FIXED: ClassVar[dict[str, Any]] = {
        "scoring_func": "softmax", "norm_topk_prob": False, **LatentAttentionArchitecture.HF_FIXED, "mlp_bias": False,
    }  # fmt: skip
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {"q_lora_rank": 1536, "first_k_dense_replace": 0, "n_shared_experts": 2}
    ROUTER_BIAS: ClassVar[bool] = False

    model_type: Literal["deepseek_v2"] = "deepseek_v2"
    topk_method: Literal["greedy", "group_limited_greedy"] = "greedy"

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.topk_method == "greedy" and self.n_group > 1:
            raise ValueError(f"topk_method is 'greedy' and n_group={self.n_group}: the groups would be used by vLLM only")
        return self

    def megatron_settings(self) -> dict[str, Any]:
        """Softmax over all experts; what is selected of it is not normalised again (V2 section 2.1.2)."""
        settings = {"moe_router_score_function": "softmax", "moe_router_pre_softmax": True}
        return super().megatron_settings() | settings

    def router_rule(self) -> RouterRule:
        """A group's score is that of its best expert; Megatron-Core's is that of its best topk / group_topk."""
        counted = self.num_experts_per_tok // self.topk_group
        return RouterRule(best_of_group=1 if self.n_group > 1 and counted != 1 else None)


FAMILY = DeepseekV2
PRESETS = {
    # The latent shape is the one that vLLM has on CPU in fp32 (see deepseek_v3).
    "tiny_deepseek_v2": DeepseekV2(
        vocab_size=449, hidden_size=128, num_hidden_layers=4, first_k_dense_replace=1, intermediate_size=256,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32,
        max_position_embeddings=1024, rope_theta=100.0, n_routed_experts=8, n_shared_experts=2, moe_intermediate_size=32,
        num_experts_per_tok=4, topk_method="group_limited_greedy", n_group=4, topk_group=2, routed_scaling_factor=1.5,
        rope_scaling=LatentYarnScaling(factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707),
        init_std=0.08,
    ),
    "deepseek_v2_lite": DeepseekV2(
        vocab_size=102400, hidden_size=2048, num_hidden_layers=27, first_k_dense_replace=1, intermediate_size=10944,
        num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128,
        max_position_embeddings=163840, rope_scaling=LatentYarnScaling(mscale=0.707, mscale_all_dim=0.707), n_routed_experts=64,
        n_shared_experts=2, moe_intermediate_size=1408, num_experts_per_tok=6,
    ),
}  # fmt: skip
