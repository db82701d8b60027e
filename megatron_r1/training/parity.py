"""Trainer against engine: do both give the sampled tokens the same log-probability?"""

from __future__ import annotations

import math

import numpy as np
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import WeightSyncError
from megatron_r1.runtime.exchange import gather_numbers
from megatron_r1.training.metrics import pooled_mean
from megatron_r1.types import TrainingSample


def compare_logprobs(samples: list[TrainingSample], reports: bool = True) -> dict[str, float]:
    """|trainer - engine| over the response tokens of an on-policy batch, in nats: "logprob_diff/mean" and "/max". Collective.

    Tokens without a finite number are left out, as they are of training (`samples.find_nonfinite`); of none at all the mean is NaN.

    Args:
        reports: whether this rank speaks for the samples that are `here`.
    """
    mine = [s for s in samples if s.here and reports]
    differences = np.empty(sum(s.num_trained for s in mine), np.float32)  # the only array beside the samples' own
    start = 0
    for sample in mine:
        part = differences[start : start + sample.num_trained]
        assert sample.old_logprobs is not None and sample.rollout_logprobs is not None, "read before the step that fills it"
        np.subtract(sample.old_logprobs[sample.trained], sample.rollout_logprobs[sample.trained], out=part)
        start += len(part)
    np.abs(differences, out=differences)
    if not (finite := np.isfinite(differences)).all():
        differences = differences[finite]
    largest = differences.max().item() if len(differences) else -math.inf
    counted = gather_numbers([len(differences), torch.from_numpy(differences).mean().item(), largest])
    largest = counted[:, 2].max().item()
    return {
        "logprob_diff/mean": pooled_mean(counted[:, 0], counted[:, 1]),
        "logprob_diff/max": largest if largest > -math.inf else math.nan,
    }


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
