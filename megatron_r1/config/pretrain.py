"""Settings of pretraining: the section `pretrain`. "V3" is DeepSeek-V3 (arXiv 2412.19437)."""

from __future__ import annotations

from pydantic import Field

from megatron_r1.config.optimizer import OptimizerConfig, PretrainMoeConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class PretrainConfig(Section):
    """Next-token pretraining, and a gate that the base model must pass before reinforcement learning."""

    steps: int = Field(1000, gt=0, description="Number of updates before the gate is measured for the first time.")
    sequence_length: int = Field(
        64, gt=1, description="Tokens of a training sequence, which may hold several documents. V3 section 4.2 states 4K."
    )
    global_batch_size: int = Field(
        16, gt=0, description="Sequences of one update, over all ranks. V3 section 4.2 states 3,072, rising to 15,360."
    )
    micro_batch_size: int = Field(
        16,
        gt=0,
        description="Sequences of one forward pass of a rank. It must divide pretrain.global_batch_size.",
        json_schema_extra=MAY_CHANGE,
    )
    mask_documents: bool = Field(
        False, description="Whether attention stays inside a document. V3 section 4.1 packs documents without such a mask."
    )
    checkpoint_interval: int = Field(
        100,
        gt=0,
        description="Steps between two checkpoints, in place of checkpoint.interval, since these steps are short.",
        json_schema_extra=MAY_CHANGE,
    )
    gate_accuracy: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Accuracy that the base model must reach on held-out problems, with greedy sampling and a prompt that opens "
        "<think>. 0: no gate. Ours: the paper has none.",
    )
    gate_problems: int = Field(128, gt=0, description="Number of held-out problems that the gate is measured on.")
    gate_extra_steps: int = Field(
        0,
        ge=0,
        description="Updates of an extra round at the final learning rate, trained whenever the gate fails. 0: no extra rounds.",
    )
    gate_max_extra: int = Field(
        0,
        ge=0,
        description="Number of extra rounds after which a base model that still fails the gate ends the run with an error.",
        json_schema_extra=MAY_CHANGE,
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=2.2e-4)
    moe: PretrainMoeConfig = PretrainMoeConfig(bias_update_rate=0.001, aux_loss_coeff=1e-4, mtp_loss_scale=0.3)
