"""Every architecture on Megatron-Core, as language models and as reward models."""

from __future__ import annotations

import torch

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.config.runtime import RuntimeConfig
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.layout import Layout, padded_vocabulary
from megatron_r1.mcore.switches import Switches
from megatron_r1.model.architecture import Architecture
from megatron_r1.weights.mapping import fused_names

require_active()

from megatron.core import parallel_state

from megatron_r1.mcore.gpt import R1GPTModel
from megatron_r1.mcore.init_weights import initialize_weights
from megatron_r1.mcore.parallel import use_graphable_generators
from megatron_r1.mcore.reward_head import RewardGPTModel
from megatron_r1.mcore.rope import yarn_frequencies
from megatron_r1.mcore.specs import block_specs
from megatron_r1.mcore.transformer_config import transformer_config


def build_model(
    arch: Architecture, layout: Layout, runtime: RuntimeConfig, moe: MoeTrainingConfig, *, seed: int, freeze_router: bool = False,
    switches: Switches | None = None,
) -> list[R1GPTModel | RewardGPTModel]:  # fmt: skip
    """This rank's part of the model, one module per virtual pipeline stage, on the active device, without any wrapper.

    `parallel.build_process_groups(layout, ...)` was called before. The initial weights depend on `seed` only, not on the layout.

    Args:
        arch: the model's shape.
        layout: how it is split.
        runtime: dtype and recomputation.
        moe: how router and multi-token prediction are trained; without effect in a dense model. With `mtp_loss_scale` 0 the
            block is built, so that its weights survive checkpoints, but frozen and not run. The biases of the router are moved
            by `balance.Balance`.
        seed: of the initial weights.
        freeze_router: router weights get no gradient (the bias is `moe.bias_update_rate`'s).
        switches: of speed; None: what a model that is only run has by default.
    """
    config = transformer_config(arch, layout, runtime, moe, switches)
    if config.cuda_graph_impl != "none":
        use_graphable_generators(seed)
    modules = []
    for stage in range(layout.vpp):
        vp_stage = stage if layout.vpp > 1 else None
        decoder, mtp = block_specs(config, vp_stage, fused_names(arch))
        module = (RewardGPTModel if arch.is_reward_model else R1GPTModel)(
            config,
            decoder,
            vocab_size=padded_vocabulary(arch.vocab_size, layout.tp),
            max_sequence_length=arch.max_position_embeddings,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            share_embeddings_and_output_weights=arch.tie_word_embeddings,
            mtp_block_spec=mtp,
            vp_stage=vp_stage,
        )
        module.vocabulary, module.whole_logits = arch.vocab_size, runtime.whole_logits_mb * 10**6
        _scale_rope(module, arch)
        initialize_weights(module, arch, seed=seed)
        module.train_mtp = mtp is not None and moe.mtp_loss_scale > 0
        module.mtp_trains_trunk = moe.mtp_trains_trunk
        if not moe.mtp_trains_trunk:
            _leave_out_of_norm(module)
        _freeze(module, mtp=not module.train_mtp, router=freeze_router)
        if switches is not None and switches.fuse_engine_gradients:
            _fuse_gradients(module)
        modules.append(module)
    return modules


def _scale_rope(module: R1GPTModel | RewardGPTModel, arch: Architecture) -> None:
    wavelength, yarn = arch.rope_wavelength_scaling(), arch.yarn_scaling()
    if wavelength is not None:
        # GPTModel(rope_scaling=True) would take 1, 4 and 8192 for all but the factor.
        rope = module.rotary_pos_emb
        rope.inv_freq = rope._apply_scaling(rope.inv_freq, **wavelength)
    if yarn is not None:
        module.rotary_pos_emb.inv_freq = yarn_frequencies(module.rotary_pos_emb.inv_freq, arch.rope_theta, **yarn)


def _leave_out_of_norm(module: torch.nn.Module) -> None:
    # Megatron-Core's mark of a copy whose gradient another rank counts. Clipping by a norm in which these are would move the rest.
    for name, parameter in module.named_parameters():
        if name.startswith("mtp."):
            parameter.shared = True


def _fuse_gradients(module: torch.nn.Module) -> None:
    # By TransformerConfig's field the output layer would have to do the same, for which Megatron-Core needs Apex.
    for layer in module.modules():
        if hasattr(layer, "fuse_wgrad_accumulation"):
            layer.fuse_wgrad_accumulation = True


def _freeze(module: torch.nn.Module, *, mtp: bool, router: bool) -> None:
    for name, parameter in module.named_parameters():
        if (mtp and name.startswith("mtp.")) or (router and name.endswith("router.weight")):
            parameter.requires_grad = False
