"""The GRPO loss."""

from __future__ import annotations

import torch

from megatron_r1.algorithms.kl import k3


def grpo_loss(
    logprobs: torch.Tensor,
    *,
    old_logprobs: torch.Tensor,
    ref_logprobs: torch.Tensor | None,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    sequence_lengths: torch.Tensor,
    denominator: float,
    clip_eps: float,
    kl_coef: float,
    normalization: str = "sequence",
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Clipped policy ratio with a KL penalty inside the loss, over any part of a minibatch.

        loss = -1/N sum_i w_i sum_t { min[rho_it A_i, clip(rho_it, 1-eps, 1+eps) A_i] - beta k3(theta, ref)_it }
        rho_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)

    "sequence": w_i = 1/|o_i| and N = number of responses; "token": w_i = 1 and N = number of response tokens. N is that of
    the whole minibatch, so losses of micro-batches and ranks add up to the same number however the minibatch is split.

    Args:
        logprobs: [...] log pi_theta of the target tokens, with gradient.
        old_logprobs: [...] of the policy before the first update on this rollout.
        ref_logprobs: [...] of the reference policy; None when kl_coef is 0.
        advantages: [...] A_i at every token of response i.
        loss_mask: [...] 1 on response tokens.
        sequence_lengths: [...] |o_i| at every token of response i.
        denominator: N.
        clip_eps: epsilon. At 10, as in R1's first RL stage, the lower bound 1 - eps never binds.
        kl_coef: beta.
        normalization: "sequence" or "token".

    Returns:
        The loss (scalar) and sums over the masked tokens: "kl/reference", "ratio/clipped_fraction", "ratio/max" is a maximum.

    Source: DeepSeek-R1 (arXiv 2501.12948) equations 1 to 3; per-token form: DeepSeekMath (arXiv 2402.03300) equations 3 and 4.
    """
    masked = loss_mask > 0
    # Outside the mask the stored log-probs are zeros: an infinite ratio there times a zero mask would be a NaN.
    log_ratio = torch.where(masked, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.exp()
    objective = torch.minimum(ratio * advantages, ratio.clamp(1.0 - clip_eps, 1.0 + clip_eps) * advantages)
    sums = {"ratio/clipped_fraction": ((ratio - 1.0).abs() > clip_eps)[masked].sum()}
    if kl_coef and ref_logprobs is not None:
        kl = k3(logprobs, torch.where(masked, ref_logprobs, logprobs.detach()))
        objective = objective - kl_coef * kl
        sums["kl/reference"] = kl.detach()[masked].sum()
    weights = loss_mask / sequence_lengths.clamp(min=1.0) if normalization == "sequence" else loss_mask
    return -(objective * weights).sum() / denominator, sums
