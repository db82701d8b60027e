"""Qwen3 with experts, as Qwen3-30B-A3B and Qwen3-235B-A22B. Sources: the published config.json files and transformers'
`Qwen3MoeForCausalLM`."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from megatron_r1.model.architecture import MOST_EXPERTS, MOST_LAYERS, MOST_WIDTH, Experts
from megatron_r1.model.grouped_query import GroupedQueryArchitecture
from megatron_r1.model.rope import YarnScaling
from megatron_r1.model.rows import Row, expert_rows


class Qwen3Moe(GroupedQueryArchitecture):
    """Qwen3's attention; experts without shared ones, softmax scores."""

    HF_CLASS: ClassVar[str] = "Qwen3MoeForCausalLM"
    HF_FIXED: ClassVar[dict[str, Any]] = {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False}
    HF_DEFAULTS: ClassVar[dict[str, Any]] = {"num_key_value_heads": 4}
    HF_NULL: ClassVar[dict[str, Any]] = {**GroupedQueryArchitecture.HF_NULL, "mlp_only_layers": []}
    HF_SPELLINGS: ClassVar[dict[str, str]] = {"num_local_experts": "num_experts"}
    HAS_FP8: ClassVar[bool] = True
    QK_NORM: ClassVar[bool] = True

    model_type: Literal["qwen3_moe"] = "qwen3_moe"
    num_experts: int = Field(128, gt=0, le=MOST_EXPERTS)
    num_experts_per_tok: int = Field(8, gt=0, le=MOST_EXPERTS)
    moe_intermediate_size: int = Field(gt=0, le=MOST_WIDTH, description="width of one expert")
    norm_topk_prob: bool = Field(False, description="whether the weights of a token's experts add up to one")
    decoder_sparse_step: int = Field(1, gt=0, le=MOST_LAYERS, description="every so many layers one has experts")
    mlp_only_layers: tuple[int, ...] = Field((), description="layers with a dense feed-forward, counted from 0")

    @model_validator(mode="after")
    def _check_experts(self) -> Self:
        if self.num_experts_per_tok > self.num_experts:
            raise ValueError(f"num_experts_per_tok={self.num_experts_per_tok} is more than num_experts={self.num_experts}")
        return self

    @property
    def experts(self) -> Experts:
        """In every layer of the published models."""
        return Experts(self.num_experts, self.moe_intermediate_size, self.num_experts_per_tok)

    def is_moe_layer(self, layer: int) -> bool:
        """As transformers and vLLM decide."""
        return layer not in self.mlp_only_layers and (layer + 1) % self.decoder_sparse_step == 0

    def megatron_settings(self) -> dict[str, Any]:
        """Softmax over the selected experts is the normalised softmax over all."""
        return super().megatron_settings() | {
            "moe_router_topk": self.num_experts_per_tok, "moe_router_score_function": "softmax",
            "moe_router_pre_softmax": not self.norm_topk_prob,
        }  # fmt: skip

    def megatron_refusal(self) -> str | None:
        """One expert whose weight is always 1."""
        if self.norm_topk_prob and self.num_experts_per_tok == 1:
            return "norm_topk_prob=true with num_experts_per_tok=1: the router would have no gradient, and Megatron-Core refuses it"
        return None

    def split_sizes(self) -> dict[str, dict[str, int]]:
        """Those of a dense model, and of the experts."""
        return super().split_sizes() | {
            "ep": {"num_experts": self.num_experts}, "etp": {"moe_intermediate_size": self.moe_intermediate_size},
        }  # fmt: skip

    def feed_forward_rows(self, layer: int) -> tuple[Row, ...]:
        """Router and experts."""
        if not self.is_moe_layer(layer):
            return super().feed_forward_rows(layer)
        router = Row(("mlp.router.weight",), ("mlp.gate.weight",), ((self.num_experts, self.hidden_size),))
        return (router, *expert_rows(self.hidden_size, self.moe_intermediate_size))

    def vllm_split_sizes(self) -> dict[str, int]:
        """Those of a dense model, and of the experts."""
        return {**super().vllm_split_sizes(), "moe_intermediate_size": self.moe_intermediate_size}


FAMILY = Qwen3Moe
PRESETS = {
    # YaRN and a dense layer among those with experts, so that the tests of all families see both.
    "tiny_qwen3_moe": Qwen3Moe(
        vocab_size=641, hidden_size=96, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, max_position_embeddings=1024, rope_theta=100.0, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True,
        moe_intermediate_size=64, mlp_only_layers=(1,), init_std=0.08,
        rope_scaling=YarnScaling(factor=4.0, original_max_position_embeddings=32),
    ),
    "qwen3_30b_a3b": Qwen3Moe(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=48, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, max_position_embeddings=40960, rope_theta=1e6, num_experts=128,
        num_experts_per_tok=8, norm_topk_prob=True, moe_intermediate_size=768,
    ),
}  # fmt: skip
