"""The GRPO loss."""

from __future__ import annotations

import math

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

    With `importance_cap` C above 0 the first term is weighted by min[pi_old(o_it) / pi_rollout(o_it), C], without gradient: kernels
    and number format make pi_rollout, which the engine sampled from, another policy than pi_old.

    Metrics: "kl/reference" (k3, if there is a reference) and "ratio/clipped_fraction", the share of tokens at which the minimum
    is the clipped ratio's, both means over tokens; "ratio/max"; with `importance_cap` "importance/mean" and
    "importance/capped_fraction", over tokens.

    Source: DeepSeek-R1 (arXiv 2501.12948) equations 1 to 3; per-token form: DeepSeekMath (arXiv 2402.03300) equations 3 and 4.
    Weights: truncated importance sampling as NeMo-RL's `use_importance_sampling_correction` has it.
    """
    masked = batch.loss_mask > 0
    # Outside the mask the stored log-probs are zeros: an infinite ratio there times a zero mask would be a NaN.
    log_ratio = torch.where(masked, batch.logprobs - batch.old_logprobs, 0.0)
    ratio = _without_overflow(log_ratio, batch.advantages, settings.clip_eps).exp()
    clipped = ratio.clamp(1.0 - settings.clip_eps, 1.0 + settings.clip_eps)
    unbound, bound = ratio * batch.advantages, clipped * batch.advantages
    objective = torch.minimum(unbound, bound)
    metrics = {
        "ratio/clipped_fraction": Metric((bound < unbound)[masked].sum(), "token_mean"),
        "ratio/max": Metric(log_ratio.detach().exp().masked_fill(~masked, 0.0).max(), "max"),
    }
    if settings.importance_cap:
        importance = torch.where(masked, batch.old_logprobs - batch.rollout_logprobs, 0.0).exp()
        objective = objective * importance.clamp(max=settings.importance_cap)
        metrics["importance/mean"] = Metric(importance[masked].sum(), "token_mean")
        metrics["importance/capped_fraction"] = Metric((importance > settings.importance_cap)[masked].sum(), "token_mean")
    if batch.ref_logprobs is not None:
        kl = k3(torch.where(masked, batch.logprobs, 0.0), torch.where(masked, batch.ref_logprobs, 0.0))
        if settings.kl_coef:
            objective = objective - settings.kl_coef * kl
        metrics["kl/reference"] = Metric(kl.detach()[masked].sum(), "token_mean")
    if settings.normalization == "sequence":
        weights, denominator = batch.loss_mask / batch.sequence_lengths, batch.minibatch_sequences
    else:
        weights, denominator = batch.loss_mask, batch.minibatch_tokens
    return -(objective * weights).sum() / denominator, metrics


def _without_overflow(log_ratio: torch.Tensor, advantages: torch.Tensor, clip_eps: float) -> torch.Tensor:
    """The log-ratios, at most e times beyond the upper clip where the advantage is not negative.

    There the minimum is the clipped ratio's, or the advantage is zero: loss and gradient are those of any ratio above the clip. A
    ratio that overflows float32 (from 88.7 nats on) would make them NaN: 0 x inf, in the branch that the minimum does not take.
    Nowhere else is a log-ratio bounded: with a negative advantage, and in the KL penalty, the gradient is the ratio's, however
    large. If it overflows, the update is not finite and is not made.
    """
    return torch.where(advantages < 0, log_ratio, log_ratio.clamp(max=math.log1p(clip_eps) + 1.0))
