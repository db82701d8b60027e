"""Settings of pretraining: the section `pretrain`. "V3" is DeepSeek-V3 (arXiv 2412.19437)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from megatron_r1.config.data import Blend
from megatron_r1.config.optimizer import OptimizerConfig, PretrainMoeConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class BatchRamp(Section):
    """A batch that grows at the beginning of a phase."""

    start: int = Field(gt=0, description="Sequences of the first update. V3 section 4.2 states 3,072.")
    increment: int = Field(
        gt=0, description="Sequences by which it grows at a time, in equal stretches of tokens. The paper does not state it."
    )
    tokens: int = Field(gt=0, description="Tokens of the phase after which the batch is full. V3 section 4.2 states 469B.")


class LearningRatePart(Section):
    """A part of a phase's learning rate, in tokens."""

    tokens: int | None = Field(
        None, gt=0, description="Tokens in which this rate holds or is reached. null: the rest of the phase, for the last part."
    )
    lr: float = Field(gt=0, description="Learning rate of this part, at its end if it changes.")
    shape: Literal["constant", "linear", "cosine"] = Field(
        "constant", description="How it gets there from the part before; from pretrain.optimizer.lr if there is none."
    )


class ValuePart(Section):
    """A value for a part of a phase, in tokens."""

    tokens: int | None = Field(
        None, gt=0, description="Tokens in which this value holds. null: the rest of the phase, for the last part."
    )
    value: float = Field(ge=0, description="What the setting is in this part of the phase.")


class PretrainPhase(Section):
    """A part of pretraining that differs from the others in data, length of sequences, RoPE, batch or rates."""

    tokens: int | None = Field(
        None, gt=0, description="Tokens of the phase, which ends with the update that reaches them. Give these or `updates`."
    )
    updates: int | None = Field(None, gt=0, description="Updates of the phase. Give these or `tokens`.")
    sequence_length: int | None = Field(
        None,
        gt=1,
        description="Tokens of a training sequence. null: pretrain.sequence_length. In a phase of another length a forward pass "
        "holds as many sequences as fit into pretrain.micro_batch_size x pretrain.sequence_length tokens, at least one.",
    )
    global_batch_size: int | None = Field(
        None, gt=0, description="Sequences of one update, after the ramp. null: pretrain.global_batch_size."
    )
    batch_ramp: BatchRamp | None = Field(None, description="How the batch grows at the beginning of the phase. null: it is full.")
    rope_scaling: dict[str, Any] | Literal["none"] | None = Field(
        None,
        description="RoPE's scaling in this phase, as in config.json; none: unscaled. null: the model's. V3 section 4.3: YaRN with "
        "factor 40 for 32K and 128K tokens.",
    )
    blend: Blend = Field(
        [],
        description="Tokenised documents of this phase, in place of data.blend, which must be set: paths, or {path, weight}. A "
        "source that phases before it had, in rows of the same length, goes on where they left it. []: data.blend.",
    )
    learning_rate: list[LearningRatePart] = Field(
        [],
        description="Learning rate in tokens of the phase, part by part, in place of pretrain.optimizer's schedule; the warm-up "
        "of the run's first updates stays. []: the schedule over all updates of the run.",
    )
    bias_update_rate: list[ValuePart] = Field([], description="Router bias speed part by part. []: pretrain.moe.bias_update_rate.")
    mtp_loss_scale: list[ValuePart] = Field(
        [], description="Weight of the multi-token-prediction loss part by part. []: pretrain.moe.mtp_loss_scale."
    )
    cp: int | None = Field(
        None,
        gt=0,
        description="Context parallelism in this phase: long sequences in small batches need fewer data-parallel ranks. null: "
        "parallel.cp. It may change when the run goes on.",
    )


class PretrainValidationConfig(Section):
    """Loss on the documents that data.split keeps from training, for each source of data.blend."""

    interval: int = Field(
        0,
        ge=0,
        description="Updates between two validations; there is one after the last update of a phase, too. 0: no validation. The "
        "paper does not state it.",
        json_schema_extra=MAY_CHANGE,
    )
    batches: int = Field(
        8,
        gt=0,
        description="Batches of pretrain.global_batch_size rows that each source is validated with, or what its documents give.",
        json_schema_extra=MAY_CHANGE,
    )


class PretrainConfig(Section):
    """Next-token pretraining, and a gate that the base model must pass before reinforcement learning."""

    steps: int = Field(
        1000, gt=0, description="Number of updates before the gate is measured for the first time. Not read with pretrain.phases."
    )
    phases: list[PretrainPhase] = Field(
        [],
        description="Parts of the training, one after the other, in place of pretrain.steps. A checkpoint is saved at the end of "
        "each. []: one phase of pretrain.steps updates. See docs/how_to/pretrain.md.",
    )
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
    fill_in_middle_rate: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of documents whose middle stands at their end: prefix, suffix, middle, behind tokens of the tokenizer "
        "that say so. V3 section 4.1 states 0.1.",
    )
    checkpoint_interval: int = Field(
        100,
        gt=0,
        description="Steps between two checkpoints, in place of checkpoint.interval, since these steps are short.",
        json_schema_extra=MAY_CHANGE,
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="Share of the moving average of the weights that an update leaves: the average is on the host, 8 bytes a "
        "parameter over the data-parallel ranks, and `megatron-r1 convert export --ema` makes a model of it. V3 section 3.2.3 has "
        "one and does not state its share. null: none.",
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
    validation: PretrainValidationConfig = PretrainValidationConfig()
    optimizer: OptimizerConfig = OptimizerConfig(lr=2.2e-4)
    moe: PretrainMoeConfig = PretrainMoeConfig(bias_update_rate=0.001, aux_loss_coeff=1e-4, mtp_loss_scale=0.3)
