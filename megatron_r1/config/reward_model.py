"""Settings of reward model training: the section `reward_model`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class RewardModelConfig(Section):
    """Reward models.

    R1 v2 section 3.1 states batch size, learning rate, epochs and length, and nothing else about the optimizer.
    """

    kind: Literal["helpful", "safety"] = Field(
        "helpful",
        description="What the model learns from. helpful: pairs of responses, of which only the final summary is scored; safety: "
        "responses labelled safe or unsafe, which are scored as a whole (R1 v2 section 3.1).",
    )
    epochs: int = Field(1, gt=0, description="Number of times that every example is trained on. R1 v2 section 3.1 states 1.")
    batch_size: int = Field(
        256, gt=0, description="Pairs, or labelled responses, of one update over all ranks. R1 v2 section 3.1 states 256."
    )
    max_tokens: int = Field(
        8192,
        gt=0,
        description="Most tokens of a response with its prompt in training. R1 v2 section 3.1 states 8,192; scoring has no limit.",
    )
    micro_batch_tokens: int = Field(
        16384,
        gt=0,
        description="Most tokens of one forward pass, into which examples are packed; a pair stays together.",
        json_schema_extra=MAY_CHANGE,
    )
    validate_interval: int = Field(
        0,
        ge=0,
        description="Updates between two measurements on the examples that data.heldout_fraction keeps. 0: only after the last "
        "update.",
        json_schema_extra=MAY_CHANGE,
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=6e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()
