"""From scored rollouts to training samples and minibatches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from megatron_r1.training.protocols import Policy, Reference
from megatron_r1.types import RolloutGroup, TrainingSample, filled

Sample = TypeVar("Sample")


def to_training_samples(groups: list[RolloutGroup]) -> list[TrainingSample]:
    """One sample per response; loss on the response tokens only."""
    samples = []
    for group in groups:
        prompt = group.prompt.token_ids
        for number, (rollout, advantage) in enumerate(zip(group.rollouts, filled(group.advantages_G).tolist(), strict=True)):
            # Entry t of a [T-1] field belongs to token t + 1, so the prompt takes len(prompt) - 1 entries.
            before = len(prompt) - 1
            samples.append(
                TrainingSample(
                    token_ids=[*prompt, *rollout.token_ids],
                    loss_mask=[0] * before + [1] * len(rollout.token_ids),
                    advantage=advantage,
                    rollout_logprobs=torch.tensor([0.0] * before + rollout.rollout_logprobs, dtype=torch.float32),
                    name=f"response {number} to problem {group.prompt.id}",
                )
            )
    return samples


def with_logprobs(samples: list[TrainingSample], policy: Policy, reference: Reference | None) -> list[TrainingSample]:
    """Samples with the trainer's log-probs before any update on them and, if there is a reference policy, with its log-probs."""
    old = policy.logprobs(samples)
    ref: Sequence[torch.Tensor | None] = reference.logprobs(samples) if reference else [None] * len(samples)
    return [replace(s, old_logprobs=o, ref_logprobs=r) for s, o, r in zip(samples, old, ref, strict=True)]


def find_nonfinite(samples: list[TrainingSample]) -> str | None:
    """One line that names the first sample whose advantage or log-prob is NaN or infinite; None: all are finite."""
    for sample in samples:
        trained = torch.tensor(sample.loss_mask) != 0
        if not math.isfinite(sample.advantage):
            return f"the advantage of {sample.name or 'a sample'} is {sample.advantage}"
        for whose, logprobs in (
            ("the rollout engine's", sample.rollout_logprobs),
            ("the policy's", sample.old_logprobs),
            ("the reference policy's", sample.ref_logprobs),
        ):
            if logprobs is not None and not logprobs[trained].isfinite().all():
                return f"{whose} log-probability of a token of {sample.name or 'a sample'} is NaN or infinite"
    return None


def minibatches(samples: list[Sample], size: int, seed: str, epochs: int = 1) -> Iterator[list[Sample]]:
    """Split the samples at random into minibatches of `size`, anew in every epoch, in which each sample is used once."""
    for epoch in range(epochs):
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}" if epoch else seed).shuffle(order)
        for start in range(0, len(order), size):
            yield [samples[i] for i in order[start : start + size]]
