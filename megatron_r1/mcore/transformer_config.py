"""Megatron-Core's description of each architecture."""

from __future__ import annotations

from dataclasses import replace

import torch

from megatron_r1.config.megatron import MegatronConfig
from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.errors import ConfigError, one_line
from megatron_r1.mcore.active import on_transformer_engine, require_active
from megatron_r1.mcore.layout import Layout
from megatron_r1.mcore.switch_rules import Machine, SwitchContext, find_machine
from megatron_r1.mcore.switches import Switches, resolve_switches
from megatron_r1.model.architecture import Architecture, Experts
from megatron_r1.runtime.device import compute_capability

require_active()

from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig


def this_machine() -> Machine:
    """What the switches have to know of this process's machine."""
    device = require_active()
    found = find_machine(device, on_transformer_engine(), compute_capability())
    # Tests run Transformer Engine's layers on a CPU, where its version says nothing.
    return replace(found, transformer_engine="0") if device == "cpu" and on_transformer_engine() else found


def transformer_config(
    arch: Architecture, layout: Layout, runtime: RuntimeConfig, moe: MoeTrainingConfig, switches: Switches | None = None
) -> TransformerConfig:
    """Megatron-Core's description of the same model; `MLATransformerConfig` of one with latent attention.

    Args:
        switches: None: what a model that is only run has by default.

    Raises:
        ConfigError: Megatron-Core 0.16.1 computes the architecture differently, or refuses the settings.
    """
    refusal = arch.megatron_refusal()
    if refusal is not None:
        raise ConfigError(f"model: {refusal}")
    kind = MLATransformerConfig if arch.ATTENTION == "latent" else TransformerConfig
    if switches is None:
        switches = resolve_switches(
            MegatronConfig(), SwitchContext(arch, layout, runtime, moe, packed=True, trains=False), this_machine()
        )
    settings = _common(arch, runtime) | _parallel(arch, layout, runtime) | _recompute(runtime) | _multi_token_prediction(arch, moe)
    if arch.experts is not None:
        settings |= _experts(arch.experts, moe)
    settings |= switches.transformer
    try:
        config = kind(**(settings | arch.megatron_settings()))
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"Megatron-Core refuses these settings: {one_line(error)}") from error
    yarn = arch.yarn_scaling()
    if yarn is not None:
        config.yarn_rotary_scaling_factor = yarn["factor"]  # no field, but attention scales sine and cosine by it
    config.router_rule = arch.router_rule()
    return config


def _common(arch: Architecture, runtime: RuntimeConfig) -> dict[str, object]:
    on_cpu = require_active() == "cpu"
    dtype = _dtype(runtime)
    return {
        "num_layers": arch.num_hidden_layers,
        "hidden_size": arch.hidden_size,
        "ffn_hidden_size": arch.intermediate_size,
        "num_attention_heads": arch.num_attention_heads,
        "moe_layer_freq": [int(arch.is_moe_layer(layer)) for layer in range(arch.num_hidden_layers)],
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
        "masked_softmax_fusion": False,
        "persist_layer_norm": not on_cpu,
        "attention_backend": None,
    }


def _experts(experts: Experts, moe: MoeTrainingConfig) -> dict[str, object]:
    """Sizes of the experts, and how they are trained. How tokens are routed is the family's."""
    return {
        "num_moe_experts": experts.count,
        "moe_ffn_hidden_size": experts.width,
        "moe_shared_expert_intermediate_size": experts.shared_width or None,
        "moe_router_dtype": "fp32",
        "moe_router_bias_update_rate": 0.0,  # `balance.Balance` moves the biases
        "moe_router_load_balancing_type": "seq_aux_loss" if moe.aux_loss_coeff else "none",
        "moe_aux_loss_coeff": moe.aux_loss_coeff,
    }


def _multi_token_prediction(arch: Architecture, moe: MoeTrainingConfig) -> dict[str, object]:
    return {"mtp_num_layers": arch.mtp_depth or None, "mtp_loss_scaling_factor": moe.mtp_loss_scale}


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
    }


def _pipeline_stages(arch: Architecture, layout: Layout) -> list[list[str]]:
    if layout.stages:
        return [list(stage) for stage in layout.stages]
    stages = [["decoder"] * count for count in layout.decoder_layers(arch.num_hidden_layers)]
    stages[0].insert(0, "embedding")
    stages[-1] += ["mtp"] * arch.mtp_depth + ["loss"]
    return stages


def _recompute(runtime: RuntimeConfig) -> dict[str, object]:
    if runtime.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if runtime.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(runtime.recompute_modules)}
    return {}


def _dtype(runtime: RuntimeConfig) -> torch.dtype:
    return torch.bfloat16 if runtime.dtype == "bf16" else torch.float32


def _leave_to_initialize_weights(weight: torch.Tensor) -> torch.Tensor:
    return weight
