"""Settings of reinforcement learning: the section `grpo`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import Section


class GrpoConfig(Section):
    """GRPO. Defaults are R1-Zero's (arXiv 2501.12948v2 section 2.1): lr 3e-6, KL 0.001, G 16, 8,192 outputs in 16 minibatches."""

    rollouts: int = Field(650, gt=0, description="rollout rounds; one round is prompts_per_rollout x group_size outputs")
    prompts_per_rollout: int = Field(512, gt=0)
    group_size: int = Field(16, gt=1)
    minibatch_size: int = Field(512, gt=0, description="outputs per policy update")
    micro_batch_tokens: int = Field(32768, gt=0, description="packed tokens per forward pass")
    loss: str = Field(
        "grpo",
        min_length=1,
        description="what a policy update minimises: grpo, or your own function as package.module:function (docs/how_to/loss.md)",
    )
    clip_eps: float = Field(0.2, gt=0, description="not stated for R1-Zero; 10 for R1's first RL stage")
    kl_coef: float = Field(0.001, ge=0)
    normalization: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: mean over a response's tokens, then over responses (DeepSeekMath eq 3); token: mean over all tokens",
    )
    advantage_std: Literal["population", "sample"] = Field("population", description="not stated")
    reference_update_interval: int = Field(400, ge=0, description="policy updates between reference refreshes; 0: never")
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()
    freeze_router: bool = Field(False, description="router weights get no gradient")
    general_updates: int = Field(
        400, ge=0, description="the last policy updates, in which general prompts and preference rewards come (v2 section 3.2.2)"
    )
    shuffle_rewards: bool = Field(
        False, description="control experiment: rewards are permuted over the batch, nothing can be learned"
    )
