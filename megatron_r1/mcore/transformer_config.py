"""Megatron-Core's description of each architecture."""

from __future__ import annotations

import torch

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.active import have_transformer_engine, require_active
from megatron_r1.mcore.layout import Layout, stage_layers
from megatron_r1.model.architecture import Architecture
from megatron_r1.model.deepseek_v3 import DeepseekV3
from megatron_r1.model.dense import DenseArchitecture

require_active()

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


def transformer_config(arch: Architecture, layout: Layout, runtime: RuntimeConfig, moe: MoeTrainingConfig) -> TransformerConfig:
    """Megatron-Core's description of the same model; `MLATransformerConfig` of deepseek_v3.

    Raises:
        ConfigError: the architecture has a router that Megatron-Core 0.16.1 computes differently.
    """
    settings = _common(arch, runtime) | _parallel(arch, layout, runtime) | _recompute(runtime)
    if isinstance(arch, DenseArchitecture):
        return TransformerConfig(**settings, **_grouped_query_attention(arch))
    assert isinstance(arch, DeepseekV3)
    _check_router(arch)
    return MLATransformerConfig(**settings, **_latent_attention(arch), **_experts(arch, moe), **_multi_token_prediction(arch, moe))


def _common(arch: Architecture, runtime: RuntimeConfig) -> dict[str, object]:
    on_cpu = require_active() == "cpu"
    dtype = _dtype(runtime)
    return {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": arch.rms_norm_eps,
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "init_method": _leave_to_initialize_weights,
        "output_layer_init_method": _leave_to_initialize_weights,
        # The three-part loss (sum, number of tokens, report) is the only one that is right under context parallelism with MTP.
        "calculate_per_token_loss": True,
        "params_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        "use_cpu_initialization": on_cpu,
        "gradient_accumulation_fusion": False,
        "bias_activation_fusion": False,
        "masked_softmax_fusion": False,
        "persist_layer_norm": not on_cpu,
        "attention_backend": None,
        "apply_rope_fusion": False,
    }


def _grouped_query_attention(arch: DenseArchitecture) -> dict[str, object]:
    """Query groups that share a key and a value head; the base of RoPE is given to the model."""
    return {
        "num_query_groups": arch.num_key_value_heads,
        "kv_channels": arch.head_dim,
        "add_qkv_bias": arch.QKV_BIAS,
        "moe_layer_freq": [0] * arch.num_hidden_layers,
    }


def _latent_attention(arch: DeepseekV3) -> dict[str, object]:
    """Multi-head latent attention with decoupled, interleaved RoPE, stretched by YaRN where the architecture asks for it."""
    settings: dict[str, object] = {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": arch.q_lora_rank,
        "kv_lora_rank": arch.kv_lora_rank,
        "qk_head_dim": arch.qk_nope_head_dim,
        "qk_pos_emb_head_dim": arch.qk_rope_head_dim,
        "v_head_dim": arch.v_head_dim,
        "rotary_base": arch.rope_theta,
    }
    scaling = arch.rope_scaling
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


def _experts(arch: DeepseekV3, moe: MoeTrainingConfig) -> dict[str, object]:
    """DeepSeekMoE: sigmoid scores, biased selection, unbiased normalised weights (V3 section 2.1.2)."""
    grouped = arch.n_group > 1
    shared = arch.n_shared_experts * arch.moe_intermediate_size
    return {
        "moe_layer_freq": [int(layer >= arch.first_k_dense_replace) for layer in range(arch.num_hidden_layers)],
        "num_moe_experts": arch.n_routed_experts,
        "moe_ffn_hidden_size": arch.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": shared or None,
        "moe_router_topk": arch.num_experts_per_tok,
        "moe_router_num_groups": arch.n_group if grouped else None,
        "moe_router_group_topk": arch.topk_group if grouped else None,
        "moe_router_score_function": "sigmoid",
        "moe_router_topk_scaling_factor": arch.routed_scaling_factor,
        "moe_router_dtype": "fp32",
        "moe_router_enable_expert_bias": True,
        "moe_router_bias_update_rate": moe.bias_update_rate,
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
        "moe_token_dispatcher_type": "alltoall",
        "moe_grouped_gemm": require_active() == "cuda" and have_transformer_engine(),
    }


def _multi_token_prediction(arch: DeepseekV3, moe: MoeTrainingConfig) -> dict[str, object]:
    return {"mtp_num_layers": arch.num_nextn_predict_layers or None, "mtp_loss_scaling_factor": moe.mtp_loss_scale}


def _parallel(arch: Architecture, layout: Layout, runtime: RuntimeConfig) -> dict[str, object]:
    interleaved = layout.vpp > 1
    return {
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vpp if interleaved else None,
        "pipeline_model_parallel_layout": _pipeline_stages(arch, layout) if layout.pp > 1 else None,
        "context_parallel_size": layout.cp,
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp,
        "sequence_parallel": layout.sequence_parallel,
        "pipeline_dtype": _dtype(runtime),
        # Batched point-to-point calls pair the wrong messages when an interleaved schedule runs over two ranks.
        "batch_p2p_comm": not interleaved,
        "overlap_p2p_comm": interleaved,
    }


def _pipeline_stages(arch: Architecture, layout: Layout) -> list[list[str]]:
    stages = [["decoder"] * count for count in stage_layers(arch.num_hidden_layers, layout.pp * layout.vpp)]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * arch.num_nextn_predict_layers + ["loss"]
    return stages


def _recompute(runtime: RuntimeConfig) -> dict[str, object]:
    if runtime.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if runtime.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(runtime.recompute_modules)}
    return {}


def _dtype(runtime: RuntimeConfig) -> torch.dtype:
    return torch.bfloat16 if runtime.dtype == "bf16" else torch.float32


def _check_router(arch: DeepseekV3) -> None:
    best = arch.num_experts_per_tok // arch.topk_group
    if arch.n_group > 1 and best != 2:
        raise ConfigError(
            f"model: num_experts_per_tok={arch.num_experts_per_tok} over topk_group={arch.topk_group}: Megatron-Core scores a group "
            f"by its best {best} experts, DeepSeek-V3 by its best 2; choose num_experts_per_tok = 2 x topk_group"
        )
    if not arch.norm_topk_prob:
        raise ConfigError("model: norm_topk_prob=false: Megatron-Core always normalises sigmoid routing weights")


def _leave_to_initialize_weights(weight: torch.Tensor) -> torch.Tensor:
    return weight
