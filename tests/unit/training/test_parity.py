"""The gate of the log-probs: what stops a run, what it says, and what a round costs."""

from __future__ import annotations

import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch

from megatron_r1.config.rollout import RolloutConfig
from megatron_r1.errors import WeightSyncError
from megatron_r1.training.parity import (
    BUCKETS,
    Worst,
    check_parity,
    compare_logprobs,
    describe_older_bound,
    over_ranks,
)
from megatron_r1.types import TrainingSample
from tests.parity_cases import check_parts_of_a_batch, draw_samples

SAMPLE = TrainingSample(
    [1, 2, 3, 4], [0, 1, 1], 1.0, torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -1.0, -2.0]), name="response 0 to problem p"
)


def one_far_off(tokens: int, by: float) -> list[TrainingSample]:
    """Responses that agree but for one token."""
    samples = draw_samples(tokens // 200, 200, scale=0.0)
    samples[7].rollout_logprobs = samples[7].rollout_logprobs.copy()
    samples[7].rollout_logprobs[2 + 41] -= by
    return samples


def check(samples: list[TrainingSample], settings: RolloutConfig) -> None:
    check_parity(compare_logprobs(samples, settings), settings, sampled_by=16, trainer=17)


def test_parity_is_measured_where_there_are_numbers() -> None:
    settings = RolloutConfig()
    off = replace(SAMPLE, rollout_logprobs=torch.tensor([0.0, -1.5, math.nan]))
    found = compare_logprobs([SAMPLE, off], settings)
    assert found.metrics(settings) == {
        "logprob_diff/mean": pytest.approx(0.5 / 3),
        "logprob_diff/max": 0.5,
        "logprob_diff/quantile": 0.5,
        "logprob_diff/beyond": pytest.approx(1 / 3),
    }
    assert found.worst == Worst(0.5, "response 0 to problem p", 1, 3, -1.0, -1.5)
    with pytest.raises(WeightSyncError):
        check([SAMPLE, off], settings)
    nothing = replace(SAMPLE, rollout_logprobs=torch.full((3,), math.nan))
    assert all(map(math.isnan, compare_logprobs([nothing], settings).metrics(settings).values()))
    with pytest.raises(WeightSyncError, match="logprob_diff/mean is nan.*no token has two finite log-probabilities"):
        check([nothing], settings)


def test_one_token_of_many_stops_nothing_and_is_reported() -> None:
    settings = RolloutConfig()
    samples = one_far_off(20_000, by=6.0)
    check(samples, settings.model_copy(update={"max_logprob_diff_mean": 1e-3}))
    found = compare_logprobs(samples, settings).metrics(settings)
    assert found["logprob_diff/max"] == pytest.approx(6.0) and found["logprob_diff/quantile"] < 1e-6
    assert found["logprob_diff/beyond"] == 1 / 20_000
    with pytest.raises(WeightSyncError, match="quantile at 100% is 6, above rollout.max_logprob_diff_max=0.01"):
        check(samples, settings.model_copy(update={"max_logprob_diff_mean": 1e-3, "logprob_diff_quantile": 1.0}))


def test_the_line_says_where_to_look() -> None:
    samples = one_far_off(4_000, by=6.0)
    settings = RolloutConfig(max_logprob_diff_mean=1.0, max_logprob_diff_quantile=5.0, max_logprob_diff_max=0.5, temperature=0.7)
    with pytest.raises(WeightSyncError) as caught:
        check(samples, settings)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("logprob_diff/quantile at 99.99% is 6, above rollout.max_logprob_diff_quantile=5")
    for part in (
        "most on token 42 (id 44) of response 7, trainer -", "1 differ by more than 0.5", "update 16 sampled, the trainer is at 17",
        "rollout.temperature=0.7", "runtime.dtype", "router", "with a larger rollout.max_logprob_diff_quantile the same",
    ):  # fmt: skip
        assert part in line, part
    with pytest.raises(WeightSyncError, match=r"^logprob_diff/mean is 0.0015, above rollout.max_logprob_diff_mean=0.001: "):
        check(samples, settings.model_copy(update={"max_logprob_diff_mean": 1e-3}))


@pytest.mark.parametrize("scale", [1e-9, 1e-4, 0.03, 30.0])
@pytest.mark.parametrize("share", [0.5, 0.99, 0.9999, 1.0])
def test_a_quantile_is_that_of_all_tokens_to_the_width_of_a_bucket(scale: float, share: float) -> None:
    samples = draw_samples(40, 500, scale)
    differences = np.sort(np.abs(np.concatenate([(s.old_logprobs - s.rollout_logprobs)[2:] for s in samples])))
    exact = differences[math.ceil(share * len(differences)) - 1].item()
    found = compare_logprobs(samples, RolloutConfig()).quantile(share)
    if exact <= 1024.0 or share == 1.0:
        assert exact <= found <= max(exact * (1 + 1 / 128), 2.0**-24 * (1 + 1 / 128))


def test_parts_put_together_are_the_whole() -> None:
    check_parts_of_a_batch()


def test_what_a_round_of_8192_answers_of_32k_tokens_costs_on_512_ranks() -> None:
    tokens, ranks = 8192 * 32_768, 512
    found = over_ranks(compare_logprobs(draw_samples(3, 100), RolloutConfig()))
    few = len(pickle.dumps((tokens, 0.1, tokens, Worst(0.1, "response 15 to problem " + "x" * 40, 32_768, 129_000, -1.0, -2.0))))
    reduced, gathered = found.buckets.nbytes, few * ranks
    assert found.buckets.nbytes == 8 * BUCKETS < 40_000
    assert 2 * reduced + gathered < 250_000 < 4 * tokens / 4000, "bytes that pass through a rank, against a float of every token"
    assert 2**63 > tokens, "a bucket holds all"


def test_bounds_of_before_are_explained() -> None:
    assert describe_older_bound(RolloutConfig()) is None
    assert describe_older_bound(RolloutConfig(max_logprob_diff_max=5.0, max_logprob_diff_quantile=2.0)) is None
    assert describe_older_bound(RolloutConfig(max_logprob_diff_max=5.0, logprob_diff_quantile=1.0)) is None
    line = describe_older_bound(RolloutConfig(max_logprob_diff_max=5.0))
    assert line is not None and "\n" not in line
    assert line.startswith("rollout.max_logprob_diff_max=5 stops no run at one token any more") and "99.99%" in line
