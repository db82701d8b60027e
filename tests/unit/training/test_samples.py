"""Training samples: what is not finite in them is named."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from megatron_r1.training.samples import find_nonfinite, to_training_samples
from megatron_r1.types import Prompt, Rollout, RolloutGroup, TrainingSample

SAMPLE = TrainingSample(
    [1, 2, 3, 4], [0, 1, 1], 1.0, torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -1.0, -2.0]), name="response 0 to problem p"
)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    ("field", "whose"),
    [("rollout_logprobs", "the rollout engine's"), ("old_logprobs", "the policy's"), ("ref_logprobs", "the reference policy's")],
)
def test_a_log_prob_that_is_not_finite_is_named(field: str, whose: str, value: float) -> None:
    good = replace(SAMPLE, ref_logprobs=torch.zeros(3))
    assert find_nonfinite([good, SAMPLE]) is None
    bad = replace(good, name="response 3 to problem q", **{field: torch.tensor([0.0, -1.0, value])})
    assert find_nonfinite([good, bad]) == (f"{whose} log-probability of a token of response 3 to problem q is NaN or infinite")
    of_prompt = replace(good, **{field: torch.tensor([value, -1.0, -2.0])})
    assert find_nonfinite([of_prompt]) is None, "nobody reads it"


def test_an_advantage_that_is_not_finite_is_named() -> None:
    assert find_nonfinite([SAMPLE, replace(SAMPLE, advantage=math.nan)]) == "the advantage of response 0 to problem p is nan"


def test_samples_are_named_by_problem_and_response() -> None:
    group = RolloutGroup(Prompt("gsm8k-17", "q", "a", "t", (1, 2)), [Rollout([3], [-1.0], "", True)] * 2, 0)
    group.advantages_G = torch.tensor([1.0, -1.0], dtype=torch.float64)
    assert [s.name for s in to_training_samples([group])] == [f"response {n} to problem gsm8k-17" for n in range(2)]
