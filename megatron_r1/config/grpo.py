"""Settings of reinforcement learning: the section `grpo`. "R1 v2" is DeepSeek-R1 (arXiv 2501.12948v2)."""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field

from megatron_r1.config.optimizer import MoeTrainingConfig, OptimizerConfig
from megatron_r1.config.section import MAY_CHANGE, Section


class LengthPhase(Section):
    """Limits that hold from some policy update on."""

    after_updates: int = Field(gt=0, description="Policy updates after which these limits hold: for the rounds that begin then.")
    max_response_tokens: int = Field(gt=0, description="Most tokens of a response from then on, in place of the limit before.")
    micro_batch_tokens: int | None = Field(
        None, gt=0, description="Most tokens of one forward pass from then on. null: grpo.micro_batch_tokens."
    )


class GrpoConfig(Section):
    """GRPO. Defaults are R1-Zero's (R1 v2 section 2.1)."""

    rollouts: int = Field(
        650,
        gt=0,
        description="Number of rounds. A round samples grpo.prompts_per_rollout x grpo.group_size outputs and then updates the "
        "policy on them. R1-Zero's 10,400 updates are 650 rounds of 16 (R1 v2 section 2.1).",
    )
    prompts_per_rollout: int = Field(
        512, gt=0, description="Different prompts of a round. R1 v2 section 2.1 states 8,192 outputs a round, 16 of each prompt."
    )
    group_size: int = Field(
        16,
        gt=1,
        description="Outputs sampled for each prompt, whose rewards are compared with each other. R1 v2 section 2.1 states 16.",
    )
    minibatch_size: int = Field(
        512,
        gt=0,
        description="Outputs of one policy update. It must divide the outputs of a round. R1 v2 section 2.1 states 16 minibatches "
        "of 8,192 outputs.",
    )
    inner_epochs: int = Field(
        1,
        gt=0,
        description="Number of times that every output of a round is trained on, in new minibatches each time. R1 v2 section 2.1 "
        "states 1.",
    )
    micro_batch_tokens: int = Field(
        34816,
        gt=0,
        description="Most tokens of one forward pass, into which outputs are packed. At least data.max_prompt_tokens + "
        "rollout.max_response_tokens - 1, so that it holds a response at its limit.",
        json_schema_extra=MAY_CHANGE,
    )
    share_prompts: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether responses to one prompt in the same forward pass share its tokens, which are then computed once. Loss "
        "and gradients are the same but for rounding. auto: on the CPU, for models without experts. always: also for models with "
        "experts, if neither their balance nor multi-token prediction is trained; elsewhere an error. Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    exact_entropy: bool = Field(
        False,
        description="Whether updates also measure the entropy of the whole distribution that each trained token is from "
        "(entropy/exact; entropy/sampled is estimated from the sampled tokens alone). Logits are then never whole, whatever "
        "runtime.whole_logits_mb says, by which sums round otherwise.",
        json_schema_extra=MAY_CHANGE,
    )
    reference_resident: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Whether the reference's weights stand on the device beside the policy's while log-probs are computed, so that "
        "both models go through the same packed forward passes in turn: those before the updates, or in a round of one update the "
        "update's own. auto: where memory, layout and the switches of the section megatron allow it. always: even if memory may be "
        "short; an error where layout or switches do not allow it. never: a pass of its own, for which the weights are exchanged. "
        "Ours.",
        json_schema_extra=MAY_CHANGE,
    )
    length_schedule: list[LengthPhase] = Field(
        [],
        description="Limits that replace rollout.max_response_tokens and grpo.micro_batch_tokens in the course of the run: a list "
        "of {after_updates, max_response_tokens, micro_batch_tokens} in the order of their updates. Engines are opened for the "
        "longest. R1 v2 section 2.1 states 65,536 tokens from update 8,200 on.",
    )
    loss: str = Field(
        "grpo",
        min_length=1,
        description="What a policy update minimises: grpo, or your own function as package.module:function (docs/how_to/loss.md).",
    )
    clip_eps: float = Field(
        0.2,
        gt=0,
        description="Epsilon of the clipped probability ratio, which counts only within 1 - epsilon and 1 + epsilon. For R1-Zero "
        "the paper does not state it; for R1's first RL stage it states 10 (R1 v2 section 3.2.1).",
    )
    importance_cap: float = Field(
        0.0,
        ge=0,
        description="Most that a token's policy term is weighted by the trainer's probability of it over the rollout engine's, "
        "which differ by kernels and number formats. 0: no weights; R1 v2 mentions none. Ours; NeMo-RL has it for DeepSeek-V3.",
    )
    kl_coef: float = Field(
        0.001,
        ge=0,
        description="Weight of the KL penalty against the reference policy, beta. R1 v2 section 2.1 states 0.001. 0: there is no "
        "penalty, and no reference policy unless grpo.measure_kl is set.",
    )
    measure_kl: bool = Field(
        False,
        description="Whether there is a reference policy with grpo.kl_coef=0, too, so that the divergence from it is measured "
        "(kl/reference) and not penalised. It costs a forward pass of every output. Ours.",
    )
    normalization: Literal["sequence", "token"] = Field(
        "sequence",
        description="Mean that the loss takes. sequence: over the tokens of a response, then over responses (DeepSeekMath "
        "equation 3); token: over all tokens. R1 prints no form with tokens: the paper does not state it.",
    )
    advantage_std: Literal["population", "sample"] = Field(
        "population",
        description="Standard deviation that a group's rewards are divided by: of G rewards over G, or over G - 1. The paper does "
        "not state it.",
    )
    reference_update_interval: int = Field(
        400,
        ge=0,
        description="Policy updates after which the reference policy becomes the latest policy. R1 v2 section 2.1 states 400. 0: "
        "never.",
    )
    optimizer: OptimizerConfig = OptimizerConfig(lr=3e-6, weight_decay=0.0)
    moe: MoeTrainingConfig = MoeTrainingConfig()
    freeze_router: bool = Field(
        False, description="Whether the weights of the experts' router get no gradient. The paper does not state it."
    )
    general_updates: int = Field(
        400,
        ge=0,
        description="Number of policy updates at the end in which general prompts and their rewards come, if data.general_source "
        "is set. R1 v2 section 3.2.2 states 400.",
    )
    shuffle_rewards: bool = Field(
        False, description="Control experiment: rewards are permuted over the whole round, so that nothing can be learned. Ours."
    )

    @property
    def updates_per_rollout(self) -> int:
        """Policy updates of one round; the last minibatch of an epoch may be smaller."""
        return self.inner_epochs * math.ceil(self.prompts_per_rollout * self.group_size / self.minibatch_size)

    @property
    def has_reference(self) -> bool:
        """Whether the policy is compared with a reference policy."""
        return self.kl_coef > 0 or self.measure_kl
