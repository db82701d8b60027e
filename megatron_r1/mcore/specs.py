"""Which modules a layer is built of: Transformer Engine's if they can be used here, else our own (`layers.py`)."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_r1.mcore.active import on_transformer_engine, require_active

require_active()

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
    get_gpt_mtp_block_spec_for_backend,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.multi_latent_attention import MLASelfAttention, MLASelfAttentionSubmodules
from megatron.core.transformer.multi_token_prediction import MultiTokenPredictionBlock, MultiTokenPredictionBlockSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)

from megatron_r1.mcore.layers import CoreAttention, LeanExperts, MtpLayer, ReplicatedLinear, RMSNorm
from megatron_r1.mcore.routing import Layer, Router


class TorchBackend(LocalSpecProvider):
    """Plain torch modules around Megatron-Core's parallel linear layers."""

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False) -> type:
        """RMSNorm everywhere: no architecture has another."""
        return RMSNorm

    def core_attention(self) -> type:
        """Attention by torch."""
        return CoreAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool, moe_use_legacy_grouped_gemm: bool) -> tuple[type, MLPSubmodules]:
        """One module per expert."""
        _, submodules = super().grouped_mlp_modules(False, False)
        return LeanExperts, submodules


def block_specs(
    config: TransformerConfig, vp_stage: int | None, fused_names: Mapping[str, str]
) -> tuple[TransformerBlockSubmodules, ModuleSpec | None]:
    """Specs of this stage's decoder layers and of its multi-token prediction block (None if this stage has none).

    Args:
        fused_names: how Transformer Engine's layers call a tensor -> how checkpoints do (`weights.mapping.fused_names`).
    """
    if on_transformer_engine():
        decoder = get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        last_layer = get_gpt_decoder_layer_specs(config, use_transformer_engine=True)[-1]
        for layer in [*decoder.layer_specs, last_layer]:
            _use_router(layer.submodules.mlp)
            layer.submodules.sharded_state_dict_keys_map = dict(fused_names)
        mtp = _mtp_spec(config, get_gpt_mtp_block_spec(config, last_layer, use_transformer_engine=True, vp_stage=vp_stage))
        return _use_layer(decoder), mtp
    backend = TorchBackend()
    layers = [_layer_spec(config, backend, bool(is_moe)) for is_moe in config.moe_layer_freq]
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    mine = layers[first : first + get_num_layers_to_build(config, vp_stage=vp_stage)]
    decoder = TransformerBlockSubmodules(layer_specs=mine, layer_norm=RMSNorm)
    mtp = _mtp_spec(config, get_gpt_mtp_block_spec_for_backend(config, layers[-1], backend, vp_stage=vp_stage))
    return _use_layer(decoder), mtp


def _mtp_spec(config: TransformerConfig, submodules: MultiTokenPredictionBlockSubmodules | None) -> ModuleSpec | None:
    if not config.mtp_num_layers or submodules is None:
        return None
    for layer in submodules.layer_specs:
        layer.module, layer.submodules.transformer_layer.module = MtpLayer, Layer
    return ModuleSpec(module=MultiTokenPredictionBlock, submodules=submodules)


def _use_layer(decoder: TransformerBlockSubmodules) -> TransformerBlockSubmodules:
    # At the end: Megatron-Core makes the multi-token-prediction block of its own kind of layer only.
    for layer in decoder.layer_specs or []:
        layer.module = Layer
    return decoder


def _use_router(mlp: ModuleSpec) -> None:
    if isinstance(mlp.submodules, MoESubmodules):
        mlp.submodules.router = Router


def _layer_spec(config: TransformerConfig, backend: TorchBackend, is_moe: bool) -> ModuleSpec:
    mlp = get_mlp_module_spec_for_backend(backend, num_experts=config.num_moe_experts if is_moe else None)
    _use_router(mlp)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_latent_attention_spec(backend)
            if config.multi_latent_attention
            else _grouped_query_spec(config, backend),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
        ),
    )


def _latent_attention_spec(backend: TorchBackend) -> ModuleSpec:
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=backend.column_parallel_linear(),
        linear_q_down_proj=ReplicatedLinear,
        linear_q_up_proj=backend.column_parallel_linear(),
        linear_kv_down_proj=ReplicatedLinear,
        linear_kv_up_proj=backend.column_parallel_linear(),
        core_attention=CoreAttention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=RMSNorm,
        kv_layernorm=RMSNorm,
    )
    return ModuleSpec(MLASelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)


def _grouped_query_spec(config: TransformerConfig, backend: TorchBackend) -> ModuleSpec:
    norm = RMSNorm if config.qk_layernorm else None  # of every head's query and key
    submodules = SelfAttentionSubmodules(
        linear_qkv=backend.column_parallel_linear(),
        core_attention=CoreAttention,
        linear_proj=backend.row_parallel_linear(),
        q_layernorm=norm,
        k_layernorm=norm,
    )
    return ModuleSpec(SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=submodules)
