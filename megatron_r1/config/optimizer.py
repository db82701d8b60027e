"""Settings that every training stage has: its sections `optimizer` and `moe`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.section import Section


class OptimizerConfig(Section):
    """AdamW (V3 section 4.2: betas 0.9/0.95, weight decay 0.1, clip 1.0); for RL these are not stated."""

    lr: float = Field(gt=0)
    min_lr_ratio: float = Field(1.0, ge=0, le=1, description="final lr over lr")
    warmup_steps: int = Field(0, ge=0, description="policy updates of linear warm-up")
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_grad: float = Field(1.0, ge=0, description="global gradient norm; 0: off")


class MoeTrainingConfig(Section):
    """How the router and the multi-token-prediction head are trained."""

    bias_update_rate: float = Field(0.0, ge=0, description="gamma of auxiliary-loss-free balancing (V3: 0.001, then 0)")
    aux_loss_coeff: float = Field(0.0, ge=0, description="alpha of the sequence-wise balance loss (V3: 1e-4)")
    mtp_loss_scale: float = Field(
        0.0, ge=0, description="lambda of multi-token prediction (V3: 0.3, then 0.1); 0: the head is not trained"
    )
