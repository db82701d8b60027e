"""Estimators of the Kullback-Leibler divergence from sampled tokens."""

from __future__ import annotations

import torch


def k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Per-token estimate of KL(pi_theta || pi_ref): pi_ref/pi_theta - log(pi_ref/pi_theta) - 1.

    Never negative, and unbiased for tokens sampled from pi_theta. Its derivative by `logprobs` is 1 - pi_ref/pi_theta, so as a
    loss its expected on-policy gradient is that of KL(pi_ref || pi_theta).

    Args:
        logprobs: [...] log pi_theta of the sampled tokens.
        ref_logprobs: [...] log pi_ref of the same tokens, a constant.

    Source: DeepSeek-R1 (arXiv 2501.12948) equation 2; Schulman, "Approximating KL divergence" (2020).
    """
    log_ratio = ref_logprobs - logprobs
    return log_ratio.exp() - log_ratio - 1.0
