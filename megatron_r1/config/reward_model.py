"""Settings of reward model training: the section `reward_model`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import Section


class RewardModelConfig(Section):
    """Reward models (v2 section 3.1: batch 256, lr 6e-6, 1 epoch, 8,192 tokens; what else the optimizer does is not stated)."""

    kind: Literal["helpful", "safety"] = Field(
        "helpful",
        description="helpful: pairs of responses, of which the final summary alone is scored; safety: responses labelled safe or "
        "not, scored as a whole",
    )
    epochs: int = Field(1, gt=0)
    batch_size: int = Field(256, gt=0, description="pairs, or labelled responses, per update")
    max_tokens: int = Field(8192, gt=0, description="of a response with its prompt in training; scoring has no such limit")
    micro_batch_tokens: int = Field(16384, gt=0, description="packed tokens per forward pass; a pair stays together")
    validate_interval: int = Field(
        0, ge=0, description="updates between measurements on the part that data.heldout_fraction keeps; 0: only at the end"
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()
