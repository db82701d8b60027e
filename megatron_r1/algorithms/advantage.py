"""Group-normalised advantages (GRPO)."""

from __future__ import annotations

import torch

_ROUNDED = 2.0**-40  # of the magnitude of what was added up: below it two float64 totals differ by the order of their sums alone
_LAST_BITS = 8  # units in the last place of a coarser dtype


def group_advantages(rewards_G: torch.Tensor, std: str = "population", magnitude: float = 0.0) -> torch.Tensor:
    """A_i = (r_i - mean(r)) / std(r) over the G responses to one prompt.

    Args:
        rewards_G: [G] rewards of one group.
        std: "population" (divide by G) or "sample" (divide by G - 1); the papers do not say which.
        magnitude: of the largest sum that a reward may be what is left of, as in 0.3 - 0.1 - 0.2.

    Returns:
        [G] float64 advantages, whose sum is zero to their accuracy. A group whose rewards are all equal, or differ only by how
        their sums were rounded (0.3 + 0.1 + 0.2 and 0.1 + 0.2 + 0.3), gets exactly zero: it holds no preference, and dividing by
        the deviation of rounding errors would turn them into a gradient.

    Source: DeepSeek-R1 (arXiv 2501.12948) equation 3; DeepSeekMath (arXiv 2402.03300) section 4.1.2, outcome supervision.
    """
    accuracy = _ROUNDED
    if rewards_G.is_floating_point() and rewards_G.dtype != torch.float64:
        accuracy = _LAST_BITS * torch.finfo(rewards_G.dtype).eps
    rewards_G = rewards_G.double()
    if rewards_G.max() - rewards_G.min() <= accuracy * max(magnitude, rewards_G.abs().max().item()):
        return torch.zeros_like(rewards_G)
    advantages_G = (rewards_G - rewards_G.mean()) / rewards_G.std(correction=0 if std == "population" else 1)
    # The rounded mean of large rewards that differ little leaves a sum; the mean of what is left is exact enough to take it out.
    # Elsewhere this would only stir the last bits.
    if advantages_G.sum().abs() > 64 * torch.finfo(torch.float64).eps * advantages_G.abs().sum():
        advantages_G = advantages_G - advantages_G.mean()
    return advantages_G
