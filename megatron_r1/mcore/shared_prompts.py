"""Where the prompt of a group's responses may be computed once for all of them."""

from __future__ import annotations

from typing import Literal

from megatron_r1.config.optimizer import MoeTrainingConfig
from megatron_r1.errors import ConfigError
from megatron_r1.mcore.layout import Layout
from megatron_r1.model.architecture import Architecture


def shares_prompts(
    choice: Literal["auto", "always", "never"], arch: Architecture, layout: Layout, moe: MoeTrainingConfig, device: str
) -> bool:
    """What `grpo.share_prompts` comes to for this model here: whether a prompt is computed once in updates and log-probs.

    Raises:
        ConfigError: "always", where it cannot be or would be another computation.
    """
    if choice == "never":
        return False
    refusal = _refusal(arch, layout, moe, device)
    if choice == "always" and refusal is not None:
        raise ConfigError(f"grpo.share_prompts=always: {refusal}; set it to auto or never")
    # Experts round otherwise if they get fewer tokens at a time: what a router chooses nearly alike may change.
    return refusal is None and (choice == "always" or arch.experts is None)


def _refusal(arch: Architecture, layout: Layout, moe: MoeTrainingConfig, device: str) -> str | None:
    if device != "cpu":
        return "the attention of packed sequences on CUDA knows no prompt that several of them share"
    if arch.experts is not None and (moe.aux_loss_coeff or moe.bias_update_rate):
        return "grpo.moe.aux_loss_coeff and bias_update_rate count a prompt's tokens once for each response"
    if arch.mtp_depth and moe.mtp_loss_scale:
        return "grpo.moe.mtp_loss_scale also trains on a prompt's tokens, once for each response"
    return None
