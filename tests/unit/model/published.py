"""config.json of published models, as far as they say anything of the shape, and what this project answers to each."""

from __future__ import annotations

from typing import Any


def _llama(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "attention_bias": False,
        "mlp_bias": False, "rms_norm_eps": 1e-05, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rope_scaling": None,
        **fields,
    }  # fmt: skip


def _qwen2(**fields: Any) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu", "use_sliding_window": False,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "torch_dtype": "bfloat16", "tie_word_embeddings": False, "use_mrope": False,
        **fields,
    }  # fmt: skip


def _latent(**fields: Any) -> dict[str, Any]:
    return {
        "attention_bias": False, "hidden_act": "silu", "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
        "v_head_dim": 128, "moe_layer_freq": 1, "pretraining_tp": 1, "tie_word_embeddings": False, "rms_norm_eps": 1e-06,
        "rope_theta": 10000, "torch_dtype": "bfloat16", "aux_loss_alpha": 0.001, "seq_aux": True, "ep_size": 1, **fields,
    }  # fmt: skip


_FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
_YARN = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
_V3 = _latent(
    architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, num_hidden_layers=61,
    intermediate_size=18432, moe_intermediate_size=2048, num_attention_heads=128, num_key_value_heads=128, n_routed_experts=256,
    n_shared_experts=1, num_experts_per_tok=8, n_group=8, topk_group=4, norm_topk_prob=True, scoring_func="sigmoid",
    topk_method="noaux_tc", routed_scaling_factor=2.5, first_k_dense_replace=3, q_lora_rank=1536, num_nextn_predict_layers=1,
    max_position_embeddings=163840, rope_scaling={**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, quantization_config=_FP8,
)  # fmt: skip
_V2 = _latent(
    architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2", vocab_size=102400, max_position_embeddings=163840,
    n_shared_experts=2, num_experts_per_tok=6, norm_topk_prob=False, scoring_func="softmax", first_k_dense_replace=1,
)  # fmt: skip
_QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "model_type": "qwen3",
    "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
_QWEN3_MOE = {
    **_QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 6144, "mlp_only_layers": [], "moe_intermediate_size": 768, "norm_topk_prob": True, "num_experts": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "router_aux_loss_coef": 0.001,
}  # fmt: skip

#: Model -> its config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "DeepSeek-V3, R1": _V3,
    "DeepSeek-V3 saved by transformers 5": {
        **{k: v for k, v in _V3.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype", "quantization_config")},
        "dtype": "bfloat16", "head_dim": 64, "qk_head_dim": 192, "rope_interleave": True,
        "rope_parameters": {**_YARN, "rope_type": "yarn", "rope_theta": 10000.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Moonlight-16B-A3B": _latent(
        architectures=["DeepseekV3ForCausalLM"], model_type="deepseek_v3", vocab_size=163840, hidden_size=2048,
        num_hidden_layers=27, intermediate_size=11264, moe_intermediate_size=1408,
        num_attention_heads=16, num_key_value_heads=16, n_routed_experts=64,
        n_shared_experts=2, num_experts_per_tok=6, n_group=1, topk_group=1, norm_topk_prob=True, scoring_func="sigmoid",
        topk_method="noaux_tc", routed_scaling_factor=2.446, first_k_dense_replace=1, q_lora_rank=None, rope_theta=50000.0,
        rms_norm_eps=1e-05, max_position_embeddings=8192, rope_scaling=None,
    ),
    "Kimi-K2": {
        **_V3, "model_type": "kimi_k2", "vocab_size": 163840, "num_attention_heads": 64, "num_key_value_heads": 64,
        "n_routed_experts": 384, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.827,
        "num_nextn_predict_layers": 0, "rope_theta": 50000.0, "max_position_embeddings": 131072,
        "rope_scaling": {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                         "original_max_position_embeddings": 4096, "type": "yarn"},
    },
    "DeepSeek-V2-Lite": {
        **_V2, "hidden_size": 2048, "num_hidden_layers": 27, "intermediate_size": 10944, "moe_intermediate_size": 1408,
        "num_attention_heads": 16, "num_key_value_heads": 16, "n_routed_experts": 64, "n_group": 1, "topk_group": 1,
        "topk_method": "greedy", "routed_scaling_factor": 1.0, "q_lora_rank": None,
        "rope_scaling": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    },
    "DeepSeek-V2": {
        **_V2, "hidden_size": 5120, "num_hidden_layers": 60, "intermediate_size": 12288, "moe_intermediate_size": 1536,
        "num_attention_heads": 128, "num_key_value_heads": 128, "n_routed_experts": 160, "n_group": 8, "topk_group": 3,
        "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0, "q_lora_rank": 1536,
        "rope_scaling": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
    },
    "Qwen2-0.5B": _qwen2(
        vocab_size=151936, hidden_size=896, num_hidden_layers=24, intermediate_size=4864, num_attention_heads=14,
        num_key_value_heads=2, max_position_embeddings=131072, sliding_window=131072, max_window_layers=24,
        tie_word_embeddings=True,
    ),
    "Qwen2.5-7B, R1-Distill-Qwen-7B": _qwen2(
        vocab_size=152064, hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28,
        num_key_value_heads=4, max_position_embeddings=131072, sliding_window=4096, max_window_layers=28, rope_theta=10000,
    ),
    "Qwen2.5-72B-Instruct with YaRN": _qwen2(
        vocab_size=152064, hidden_size=8192, num_hidden_layers=80, intermediate_size=29568, num_attention_heads=64,
        num_key_value_heads=8, max_position_embeddings=32768,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"},
    ),
    "Qwen3-8B": _QWEN3,
    "Qwen3-8B with YaRN": {
        **_QWEN3, "max_position_embeddings": 131072,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    },
    "Qwen3-30B-A3B": _QWEN3_MOE,
    "Qwen3-235B-A22B": {
        **_QWEN3_MOE, "hidden_size": 4096, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_attention_heads": 64,
        "num_hidden_layers": 94,
    },
    "Llama-2-7b": _llama(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096, torch_dtype="float16",
    ),
    "Meta-Llama-3-8B": _llama(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0,
    ),
    "Llama-3.1-8B, R1-Distill-Llama-8B": _llama(
        vocab_size=128256, hidden_size=4096, num_hidden_layers=32, intermediate_size=14336, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=131072, rope_theta=500000.0, rope_scaling=_LLAMA3,
        eos_token_id=[128001, 128008, 128009],
    ),
    "Llama-3.2-1B": _llama(
        vocab_size=128256, hidden_size=2048, num_hidden_layers=16, intermediate_size=8192, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=131072, rope_theta=500000.0, tie_word_embeddings=True,
        rope_scaling={**_LLAMA3, "factor": 32.0},
    ),
    "Yi-34B": _llama(
        vocab_size=64000, hidden_size=7168, num_hidden_layers=60, intermediate_size=20480, num_attention_heads=56,
        num_key_value_heads=8, max_position_embeddings=4096, rope_theta=5000000.0,
    ),
    "deepseek-coder-6.7b": _llama(
        vocab_size=32256, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=16384, rope_theta=100000, rope_scaling={"factor": 4.0, "type": "linear"},
    ),
    "Yarn-Llama-2-7b-64k": _llama(
        vocab_size=32000, hidden_size=4096, num_hidden_layers=32, intermediate_size=11008, num_attention_heads=32,
        num_key_value_heads=32, max_position_embeddings=4096,
        rope_scaling={"factor": 16.0, "original_max_position_embeddings": 4096, "type": "yarn", "finetuned": True},
    ),
    "Qwen2.5-Math-PRM-7B": _qwen2(
        architectures=["Qwen2ForProcessRewardModel"], vocab_size=152064, hidden_size=3584, num_hidden_layers=28,
        intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, max_position_embeddings=4096,
    ),
    "DeepSeek-V3.2": {**_V3, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_topk": 2048},
    "deepseek-moe-16b": {"architectures": ["DeepseekForCausalLM"], "model_type": "deepseek"},
    "Kimi-K2.5": {"architectures": ["KimiK25ForConditionalGeneration"], "model_type": "kimi_k25"},
    "Qwen1.5-MoE-A2.7B": {"architectures": ["Qwen2MoeForCausalLM"], "model_type": "qwen2_moe"},
    "Qwen3-Next-80B-A3B": {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"},
    "Llama-4-Scout": {"architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4"},
    "Mistral-7B-v0.3": {"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
    "Mixtral-8x7B": {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"},
    "Phi-3-mini, Phi-4": {"architectures": ["Phi3ForCausalLM"], "model_type": "phi3"},
    "gemma-2-9b": {"architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2"},
    "gemma-3-27b": {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3"},
    "GLM-4.5": {"architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe"},
    "glm-4-9b": {"architectures": ["GlmForCausalLM"], "model_type": "glm"},
    "gpt-oss-20b": {"architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss"},
    "OLMo-2": {"architectures": ["Olmo2ForCausalLM"], "model_type": "olmo2"},
}  # fmt: skip
