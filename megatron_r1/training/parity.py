"""Trainer against engine: do both give the sampled tokens the same log-probability?"""

from __future__ import annotations

import math

import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import WeightSyncError
from megatron_r1.types import TrainingSample, filled


def compare_logprobs(samples: list[TrainingSample]) -> dict[str, float]:
    """|trainer - engine| over the response tokens of an on-policy batch, in nats: "logprob_diff/mean" and "/max".

    Tokens without a finite number are left out, as they are of training (`samples.find_nonfinite`); of none at all the mean is NaN.
    """
    differences = torch.cat(
        [(filled(s.old_logprobs) - filled(s.rollout_logprobs))[torch.tensor(s.loss_mask) > 0] for s in samples]
    ).abs()
    differences = differences[differences.isfinite()]
    largest = differences.max().item() if len(differences) else math.nan
    return {"logprob_diff/mean": differences.mean().item(), "logprob_diff/max": largest}


def check_parity(differences: dict[str, float], bounds: RolloutConfig) -> None:
    """Stop if the engine samples from another policy than the one that is trained.

    Raises:
        WeightSyncError: a difference is above its bound, or not a number.
    """
    for name, bound_key in (("logprob_diff/mean", "max_logprob_diff_mean"), ("logprob_diff/max", "max_logprob_diff_max")):
        bound = getattr(bounds, bound_key)
        if not differences[name] <= bound:
            raise WeightSyncError(
                f"{name} is {differences[name]:.3g}, above rollout.{bound_key}={bound:g}: trainer and engine disagree on the "
                "sampled tokens; look at weight sync and dtype, or raise the bound (bf16 needs about 0.05 and 2)"
            )
