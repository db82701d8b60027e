"""Settings of pretraining: the section `pretrain`."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class PretrainConfig(Section):
    """Next-token pretraining."""

    steps: int = Field(1000, gt=0)
    sequence_length: int = Field(64, gt=1)
    global_batch_size: int = Field(16, gt=0, description="sequences per update")
    micro_batch_size: int = Field(16, gt=0, description="sequences per forward pass")
    mask_documents: bool = Field(False, description="attention stays inside a document (V3 pretraining packs without it)")
    checkpoint_interval: int = Field(
        100,
        gt=0,
        description="steps between checkpoints, in place of checkpoint.interval: these steps are short",
        json_schema_extra=MAY_CHANGE,
    )
    gate_accuracy: float = Field(
        0.0, ge=0, le=1, description="greedy accuracy with a forced <think> that the base must reach; 0: no gate"
    )
    gate_problems: int = Field(128, gt=0)
    gate_extra_steps: int = Field(0, ge=0, description="continue at the final lr, this many steps at a time, while the gate fails")
    gate_max_extra: int = Field(0, ge=0, description="give up after this many extra rounds")
    optimizer: OptimizerConfig = OptimizerConfig(lr=2.2e-4)
    moe: MoeTrainingConfig = MoeTrainingConfig(bias_update_rate=0.001, aux_loss_coeff=1e-4, mtp_loss_scale=0.3)
