"""Settings that every training stage has: its sections `optimizer` and `moe`.

"V3" is DeepSeek-V3 (arXiv 2412.19437), "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section


class OptimizerConfig(Section):
    """AdamW. V3 section 4.2 states it for pretraining; for reinforcement learning only the learning rate is stated."""

    lr: float = Field(
        gt=0,
        description="Learning rate after the warm-up, the highest one. Stated are 2.2e-4 for pretraining (V3 section 4.2), 3e-6 "
        "for R1-Zero and R1's reinforcement learning (R1 v2 sections 2.1 and 3.2.1), 5e-6 for the 800K fine-tuning (R1 v2 B.4.2) "
        "and 6e-6 for reward models (R1 v2 section 3.1).",
    )
    min_lr_ratio: float = Field(
        1.0,
        ge=0,
        le=1,
        description="Final learning rate as a share of `lr`. The fine-tuning stages end at a tenth (R1 v2 B.4.2); for "
        "reinforcement learning the paper does not state it.",
    )
    warmup_steps: int = Field(
        0,
        ge=0,
        description="Policy updates in which the learning rate rises linearly from 0. V3 pretraining takes 2,000 (V3 section "
        "4.2); for the other stages the paper does not state it.",
    )
    schedule: Literal["constant", "cosine", "linear", "wsd"] = Field(
        "constant",
        description="How the learning rate falls from `lr` to its final value between the warm-up and the last update. wsd "
        "(warm-up, stable, decay): it stays, and falls in the last `wsd_decay_updates`. "
        "Fine-tuning takes cosine (R1 v2 B.4.2); for reinforcement learning the paper does not state it.",
    )
    decay_updates: int | None = Field(
        None,
        gt=0,
        description="Policy updates after which the learning rate has its final value, the warm-up included. null: all updates of "
        "the run. A run that is to go on for longer must name it, unless the rate is constant.",
    )
    wsd_decay_updates: int | None = Field(
        None,
        gt=0,
        description="Policy updates at the end in which the learning rate of schedule wsd falls, at most those after the warm-up. "
        "null: a tenth of all.",
    )
    wsd_decay_shape: Literal["minus_sqrt", "linear", "cosine", "exponential"] = Field(
        "minus_sqrt",
        description="How the learning rate of schedule wsd falls, by the names of Megatron-LM: minus_sqrt is 1 - sqrt(share of the "
        "fall), exponential is 2 x 0.5^share - 1.",
    )
    beta1: float = Field(
        0.9,
        ge=0,
        lt=1,
        description="AdamW's decay rate of the mean of gradients, per update. V3 section 4.2 states 0.9 for pretraining.",
    )
    beta2: float = Field(
        0.95,
        ge=0,
        lt=1,
        description="AdamW's decay rate of the mean of squared gradients, per update. V3 section 4.2 states 0.95 for pretraining.",
    )
    eps: float = Field(
        1e-8,
        gt=0,
        description="Small number that AdamW adds to the root of the mean of squared gradients. The paper does not state it.",
    )
    weight_decay: float = Field(
        0.1,
        ge=0,
        description="AdamW's decoupled weight decay, a factor of the learning rate. V3 section 4.2 states 0.1 for pretraining; "
        "for the other stages the paper does not state it.",
    )
    clip_grad: float = Field(
        1.0,
        ge=0,
        description="Largest norm of the gradient over all parameters; a longer gradient is scaled down to it. 0: off. V3 section "
        "4.2 states 1.0 for pretraining.",
    )
    skip_grad_norm: float | None = Field(
        None,
        gt=0,
        description="Norm of the gradient, before clipping, above which an update is left out as a spike: nothing of the model or "
        "the optimizer changes. Each is reported with samples and counted (updates/skipped). null: none is. It may change for the "
        "updates that follow. Ours: the paper reports no spike that could not be undone.",
    )


class MoeTrainingConfig(Section):
    """How the router and the multi-token-prediction head are trained. For reinforcement learning the paper does not state it."""

    bias_update_rate: float = Field(
        0.0,
        ge=0,
        description="Step of an expert's routing bias after each update, gamma of auxiliary-loss-free balancing. V3 section 4.2 "
        "states 0.001, and 0 for the last 500B tokens.",
    )
    aux_loss_coeff: float = Field(
        0.0,
        ge=0,
        description="Weight of the sequence-wise balance loss, alpha. V3 section 4.2 states 1e-4. 0: the loss is left out.",
    )
    mtp_loss_scale: float = Field(
        0.0,
        ge=0,
        description="Weight of the multi-token-prediction loss, lambda. V3 section 4.2 states 0.3 for the first 10T tokens, then "
        "0.1. 0: the head is not trained.",
    )
    mtp_trains_trunk: bool = Field(
        False,
        description="Whether the multi-token-prediction loss also trains the layers below its head, the embedding and the output "
        "layer, as in V3's pretraining. Off, the head follows a model that learns as without it; its gradient is then left out "
        "of the gradient norm. For the other stages the paper does not state it.",
    )


class PretrainMoeConfig(MoeTrainingConfig):
    """The same for pretraining, where multi-token prediction is there to train the whole model."""

    mtp_trains_trunk: bool = Field(
        True,
        description="Whether the multi-token-prediction loss trains the whole model, as V3's pretraining does (V3 section 2.2), or "
        "its head alone.",
    )
