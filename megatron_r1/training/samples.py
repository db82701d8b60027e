"""From scored rollouts to training samples and minibatches."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from megatron_r1.runtime.distributed import gather_objects, rank
from megatron_r1.runtime.exchange import gather_numbers
from megatron_r1.training.protocols import Found, Policy, Reference
from megatron_r1.types import LOGPROBS, RolloutGroup, TrainingSample, filled, hollow

Sample = TypeVar("Sample")


def to_training_samples(groups: list[RolloutGroup]) -> list[TrainingSample]:
    """One sample per response; loss on the response tokens only. Those of other ranks' groups are `hollow`."""
    samples = []
    for place, group in enumerate(groups):
        prompt = np.array(group.prompt.token_ids, np.int32)
        before = len(prompt) - 1  # Entry t of a [T-1] field belongs to token t + 1.
        here = group.owner == rank()
        for number, (rollout, advantage) in enumerate(zip(group.rollouts, filled(group.advantages_G).tolist(), strict=True)):
            targets = before + len(rollout.token_ids)
            logprobs = [np.zeros(before, np.float32), rollout.rollout_logprobs]
            samples.append(
                TrainingSample(
                    token_ids=np.concatenate([prompt, rollout.token_ids]) if here else hollow(targets + 1, np.int32),
                    loss_mask=slice(before, targets),
                    advantage=advantage,
                    rollout_logprobs=np.concatenate(logprobs) if here else hollow(targets, np.float32),
                    name=f"response {number} to problem {group.prompt.id}",
                    here=here,
                    holder=group.owner,
                    group=place,
                )
            )
    return samples


def with_logprobs(samples: list[TrainingSample], policy: Policy, reference: Reference | None) -> list[TrainingSample]:
    """Samples with the trainer's log-probs before any update on them and, if there is a reference policy, with its log-probs.

    They are where they were computed, and `hollow` elsewhere.
    """
    found: Found = {}
    if reference is None:
        found["old_logprobs"] = policy.logprobs(samples)
    else:
        found["old_logprobs"], found["ref_logprobs"] = reference.logprobs_of_both(samples)

    def add(number: int, sample: TrainingSample) -> TrainingSample:
        arrays: dict[str, Any] = {name: _as_array(logprobs[number], sample) for name, logprobs in found.items()}
        return replace(sample, **arrays)

    return [add(number, sample) for number, sample in enumerate(samples)]


def fill_logprobs(samples: list[TrainingSample], name: str, logprobs: list[torch.Tensor | None]) -> None:
    """Give samples what `Policy.logprobs` or an update's own walk found, as their field `name`."""
    for sample, of_sample in zip(samples, logprobs, strict=True):
        setattr(sample, name, _as_array(of_sample, sample))


def _as_array(logprobs: torch.Tensor | None, sample: TrainingSample) -> np.ndarray:
    return hollow(sample.num_targets, np.float32) if logprobs is None else logprobs.numpy()


def find_nonfinite(samples: list[TrainingSample], reports: bool = True) -> str | None:
    """One line that names the first sample whose advantage or log-prob is NaN or infinite; None: all are finite. Collective.

    Args:
        reports: whether this rank speaks for the samples that are `here`.
    """
    found = next(((i, problem) for i, s in enumerate(samples) if (problem := _nonfinite_in(s, reports)) is not None), None)
    first = int(gather_numbers([len(samples) if found is None else found[0]]).min())
    if first == len(samples):
        return None
    problems = gather_objects(found[1] if found is not None and found[0] == first else None)  # one line, and seldom
    return next(filter(None, problems))


def _nonfinite_in(sample: TrainingSample, reports: bool) -> str | None:
    name = sample.name or "a sample"
    if not math.isfinite(sample.advantage):
        return f"the advantage of {name} is {sample.advantage}"
    if not (sample.here and reports):
        return None
    for whose, field in zip(("the rollout engine's", "the policy's", "the reference policy's"), LOGPROBS, strict=True):
        logprobs = getattr(sample, field)
        if logprobs is not None and not np.isfinite(logprobs[sample.trained]).all():
            return f"{whose} log-probability of a token of {name} is NaN or infinite"
    return None


def plan_epochs(count: int, size: int, seed: str, epochs: int) -> list[list[list[int]]]:
    """The minibatches of each of `epochs`, as sample numbers; see `minibatches`."""
    planned = list(minibatches(list(range(count)), size, seed, epochs))
    per_epoch = -(-count // size)
    return [planned[start : start + per_epoch] for start in range(0, len(planned), per_epoch)]


def minibatches(samples: list[Sample], size: int, seed: str, epochs: int = 1) -> Iterator[list[Sample]]:
    """Split the samples at random into minibatches of `size`, anew in every epoch, in which each sample is used once."""
    for epoch in range(epochs):
        order = list(range(len(samples)))
        random.Random(f"{seed}/{epoch}" if epoch else seed).shuffle(order)
        for start in range(0, len(order), size):
            yield [samples[i] for i in order[start : start + size]]
