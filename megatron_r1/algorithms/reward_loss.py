"""The losses of reward models (DeepSeek-R1, arXiv 2501.12948v2, section 3.1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def pairwise_loss(
    chosen_P: torch.Tensor, rejected_P: torch.Tensor, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-log sigmoid(r_chosen - r_rejected), the negative log-likelihood of the preferences under Bradley and Terry's model.

    Args:
        chosen_P: [P] scores of the preferred responses, with gradient.
        rejected_P: [P] scores of the others.
        denominator: number of pairs in the whole batch, so that parts of it add up.

    Returns:
        The loss (scalar) and sums over the pairs: "accuracy", 1 where the chosen one is scored higher and half where both are
        scored the same, and "margin", r_chosen - r_rejected.
    """
    margin = chosen_P - rejected_P
    sums = {"accuracy": ((margin > 0) + 0.5 * (margin == 0)).sum(), "margin": margin.detach().sum()}
    return -F.logsigmoid(margin).sum() / denominator, sums


def pointwise_loss(
    scores_P: torch.Tensor, safe_P: torch.Tensor, *, denominator: float
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Binary cross-entropy of sigmoid(r), the probability that a response is safe.

    Args:
        scores_P: [P] scores, with gradient.
        safe_P: [P] 1 for safe, 0 for unsafe.
        denominator: number of responses in the whole batch, so that parts of it add up.

    Returns:
        The loss (scalar) and sums over the responses: "accuracy", 1 where r > 0 agrees with the label.
    """
    correct = (scores_P > 0) == (safe_P > 0.5)
    loss = F.binary_cross_entropy_with_logits(scores_P, safe_P.to(scores_P.dtype), reduction="sum")
    return loss / denominator, {"accuracy": correct.sum()}
