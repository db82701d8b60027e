"""The loss of a reward model that is trained on pairs of responses."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from megatron_r1.algorithms.losses.contract import Metrics
from megatron_r1.types import Metric


def pairwise_loss(scores_S: torch.Tensor, safe_S: torch.Tensor, *, denominator: float) -> tuple[torch.Tensor, Metrics]:
    """-log sigmoid(r_chosen - r_rejected), the negative log-likelihood of the preferences under Bradley and Terry's model.

    Args:
        scores_S: [S] scores with gradient, S even: the preferred response of a pair, then the other one.
        safe_S: [0] empty: pairs have no labels.
        denominator: number of pairs in the whole batch, so that parts of it add up.

    Returns:
        The loss (scalar), and means over pairs: "accuracy", 1 if the chosen response is scored higher and half if both are
        scored the same, and "margin", r_chosen - r_rejected.

    Source: DeepSeek-R1 (arXiv 2501.12948v2) section 3.1.
    """
    margin = scores_S[0::2] - scores_S[1::2]
    metrics = {
        "accuracy": Metric(((margin > 0) + 0.5 * (margin == 0)).sum(), "sample_mean"),
        "margin": Metric(margin.detach().sum(), "sample_mean"),
    }
    return -F.logsigmoid(margin).sum() / denominator, metrics
