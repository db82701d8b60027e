"""The loss of a reward model that is trained on responses labelled safe or unsafe."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_r1.algorithms.losses.contract import Metrics
from megatron_r1.types import Metric


def safety_loss(scores_S: torch.Tensor, safe_S: torch.Tensor, *, denominator: float) -> tuple[torch.Tensor, Metrics]:
    """Binary cross-entropy of sigmoid(r), the probability that a response is safe.

    Args:
        scores_S: [S] scores, with gradient.
        safe_S: [S] 1 for safe, 0 for unsafe.
        denominator: number of responses in the whole batch, so that parts of it add up.

    Returns:
        The loss (scalar), and the mean over responses "accuracy", 1 if r > 0 agrees with the label.

    Source: DeepSeek-R1 (arXiv 2501.12948v2) section 3.1.
    """
    correct = (scores_S > 0) == (safe_S > 0.5)
    loss = F.binary_cross_entropy_with_logits(scores_S, safe_S.to(scores_S.dtype), reduction="sum")
    return loss / denominator, {"accuracy": Metric(correct.sum(), "sample_mean")}
