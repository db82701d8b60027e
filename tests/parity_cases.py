"""Samples whose log-probs differ between trainer and engine, and what ranks find that hold a part of them each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.runtime.distributed import rank, world_size
from megatron_r1.training.parity import compare_logprobs, over_ranks
from megatron_r1.types import TrainingSample


def draw_samples(count: int, tokens: int, scale: float = 0.01) -> list[TrainingSample]:
    """Responses with differences of about `scale` nats, of which some are a hundred times that."""
    generator = torch.Generator().manual_seed(count)
    made = []
    for number in range(count):
        trainer = -torch.rand(tokens + 2, generator=generator)
        off = torch.randn(tokens + 2, generator=generator) * scale
        off[torch.rand(tokens + 2, generator=generator) < 0.01] *= 100
        mask = [0, 0, *[1] * tokens]
        sample = TrainingSample(list(range(tokens + 3)), mask, 0.0, trainer + off, trainer, name=f"response {number}")
        sample.loss_mask = slice(2, 2 + tokens) if number % 2 else sample.loss_mask
        made.append(sample)
    return made


def check_parts_of_a_batch() -> None:
    """Each rank looks at some samples, also at none or at some without a number: all know what one rank finds that has all."""
    settings = RolloutConfig(max_logprob_diff_max=0.3)
    for count in (1, 2, 13):
        samples = draw_samples(count, 200)
        samples[-1].rollout_logprobs = np.full_like(samples[-1].rollout_logprobs, np.nan)
        whole = compare_logprobs(samples, settings)
        pooled = over_ranks(compare_logprobs(samples[rank() :: world_size()], settings))
        assert (pooled.count, pooled.beyond, pooled.worst) == (whole.count, whole.beyond, whole.worst)
        assert torch.equal(pooled.buckets, whole.buckets)
        assert pooled.mean == pytest.approx(whole.mean, rel=1e-6, nan_ok=count == 1)
        assert pooled.quantile(0.999) == pytest.approx(whole.quantile(0.999), rel=0, nan_ok=count == 1)
