"""Named shapes, from the quickstart's to DeepSeek-V3's."""

from __future__ import annotations

from megatron_r1.errors import ConfigError
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.deepseek_v3 import DeepseekV3, RopeScaling
from megatron_r1.model.dense import Qwen2
from megatron_r1.model.hf_config import describe_errors

PRESETS: dict[str, Architecture] = {
    # kv_lora_rank 512 with RoPE 64 is the one MLA shape that vLLM's CPU backend serves in fp32.
    # rope_theta 100: sequences are under 64 tokens. init_std 0.08: 0.006 at hidden size 128 learns several times slower.
    "tiny": DeepseekV3(
        vocab_size=448, hidden_size=128, num_hidden_layers=3, first_k_dense_replace=1, intermediate_size=256,
        num_attention_heads=4, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=32, qk_rope_head_dim=64, v_head_dim=32,
        max_position_embeddings=1024, rope_theta=100.0, n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=64,
        num_experts_per_tok=2, n_group=1, topk_group=1, routed_scaling_factor=1.0, init_std=0.08,
    ),
    # A dense student for the tiny model's data.
    "tiny_qwen2": Qwen2(
        vocab_size=640, hidden_size=96, num_hidden_layers=3, intermediate_size=256, num_attention_heads=3, num_key_value_heads=1,
        head_dim=32, max_position_embeddings=1024, rope_theta=100.0, tie_word_embeddings=True, init_std=0.08,
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


def resolve_architecture(preset: str, overrides: dict | None = None) -> Architecture:
    """The preset's shape with some fields replaced.

    Raises:
        ConfigError: unknown preset, unknown field or values that contradict each other.
    """
    if preset not in PRESETS:
        raise ConfigError(f"model.preset={preset!r} is unknown; choose one of {', '.join(PRESETS)}")
    shape = PRESETS[preset]
    unknown = set(overrides or {}) - set(type(shape).model_fields)
    if unknown:
        raise ConfigError(
            f"model.overrides has unknown fields {sorted(unknown)}; the fields are those of the Hugging Face config.json"
        )
    try:
        return type(shape)(**{**shape.model_dump(), **(overrides or {})})
    except ValueError as error:
        raise ConfigError(f"model.overrides: {describe_errors(error)}") from error
