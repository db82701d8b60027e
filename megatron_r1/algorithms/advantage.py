"""Group-normalised advantages (GRPO)."""

from __future__ import annotations

import torch


def group_advantages(rewards_G: torch.Tensor, std: str = "population") -> torch.Tensor:
    """A_i = (r_i - mean(r)) / std(r) over the G responses to one prompt.

    Args:
        rewards_G: [G] rewards of one group.
        std: "population" (divide by G) or "sample" (divide by G - 1); the papers do not say which.

    Returns:
        [G] float64 advantages. A group whose rewards are all equal gets exactly zero: it holds no preference, and a small
        epsilon under the fraction would turn rounding errors of the mean into a gradient.

    Source: DeepSeek-R1 (arXiv 2501.12948) equation 3; DeepSeekMath (arXiv 2402.03300) section 4.1.2, outcome supervision.
    """
    rewards_G = rewards_G.double()
    if rewards_G.max() == rewards_G.min():
        return torch.zeros_like(rewards_G)
    return (rewards_G - rewards_G.mean()) / rewards_G.std(correction=0 if std == "population" else 1)
