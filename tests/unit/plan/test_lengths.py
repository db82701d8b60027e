from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.plan.lengths import ResponseLengths


@pytest.mark.parametrize(("mean", "limit"), [(500, 8192), (1340, 8192), (6000, 8192), (8100, 8192), (8192, 32768)])
def test_quantiles_have_the_mean_and_keep_the_limit(mean: int, limit: int) -> None:
    found = ResponseLengths(mean, limit).quantiles(512)
    assert found.mean() == pytest.approx(mean, rel=1e-3)
    assert found.max() <= limit and found.min() > 0 and (np.diff(found) >= 0).all()


def test_more_responses_have_a_longer_tail() -> None:
    lengths = ResponseLengths(1000, 8192)
    assert lengths.quantiles(8192)[-1] == 8192 > lengths.quantiles(64)[-1]


def test_without_spread_all_are_alike() -> None:
    lengths = ResponseLengths(1000, 8192, spread=0)
    assert (lengths.quantiles(8) == 1000).all()
    assert lengths.variation() == 0 and lengths.mean_square() == 1e6


def test_a_mean_at_the_limit_is_the_limit() -> None:
    assert (ResponseLengths(9000, 8192).quantiles(4) == 8192).all()


def test_variation_is_that_of_the_uncut_distribution_where_nothing_is_cut() -> None:
    lengths = ResponseLengths(1000, 1_000_000, spread=0.5)
    assert lengths.variation() == pytest.approx((np.exp(0.25) - 1) ** 0.5, rel=0.03)
