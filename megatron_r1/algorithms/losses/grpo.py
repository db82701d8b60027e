"""The GRPO loss."""

from __future__ import annotations

import torch

from megatron_r1.algorithms.kl import k3
from megatron_r1.algorithms.losses.contract import Metrics, PolicyBatch, PolicySettings
from megatron_r1.types import Metric


def grpo_loss(batch: PolicyBatch, settings: PolicySettings) -> tuple[torch.Tensor, Metrics]:
    """Clipped policy ratio with a KL penalty inside the loss. Arguments and result: see `contract`.

        loss = -1/N sum_i w_i sum_t { min[rho_it A_i, clip(rho_it, 1-eps, 1+eps) A_i] - beta k3(theta, ref)_it }
        rho_it = pi_theta(o_it | q, o_i<t) / pi_old(o_it | q, o_i<t)

    "sequence": w_i = 1/|o_i| and N = number of responses; "token": w_i = 1 and N = number of response tokens, both of the whole
    minibatch. At epsilon 10, as in R1's first RL stage, the lower bound 1 - epsilon never binds.

    Metrics: "kl/reference" (k3, if there is a penalty) and "ratio/clipped_fraction", means over tokens; "ratio/max".

    Source: DeepSeek-R1 (arXiv 2501.12948) equations 1 to 3; per-token form: DeepSeekMath (arXiv 2402.03300) equations 3 and 4.
    """
    masked = batch.loss_mask > 0
    # Outside the mask the stored log-probs are zeros: an infinite ratio there times a zero mask would be a NaN.
    log_ratio = torch.where(masked, batch.logprobs - batch.old_logprobs, 0.0)
    ratio = log_ratio.exp()
    clipped = ratio.clamp(1.0 - settings.clip_eps, 1.0 + settings.clip_eps)
    objective = torch.minimum(ratio * batch.advantages, clipped * batch.advantages)
    metrics = {
        "ratio/clipped_fraction": Metric(((ratio - 1.0).abs() > settings.clip_eps)[masked].sum(), "token_mean"),
        "ratio/max": Metric(ratio.detach().masked_fill(~masked, 0.0).max(), "max"),
    }
    if settings.kl_coef and batch.ref_logprobs is not None:
        kl = k3(batch.logprobs, torch.where(masked, batch.ref_logprobs, batch.logprobs.detach()))
        objective = objective - settings.kl_coef * kl
        metrics["kl/reference"] = Metric(kl.detach()[masked].sum(), "token_mean")
    if settings.normalization == "sequence":
        weights, denominator = batch.loss_mask / batch.sequence_lengths, batch.minibatch_sequences
    else:
        weights, denominator = batch.loss_mask, batch.minibatch_tokens
    return -(objective * weights).sum() / denominator, metrics
