"""Estimators over several samples per problem, with intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """Probability that at least one of k samples is right, estimated without bias from `correct` of `samples`.

        pass@k = 1 - C(n - c, k) / C(n, k)

    Source: Chen et al. 2021 (arXiv 2107.03374) equation 1. With k = 1 it is c/n, as R1 reports pass@1.

    Raises:
        ValueError: k is not in 1..samples, or correct not in 0..samples.
    """
    if not 1 <= k <= samples or not 0 <= correct <= samples:
        raise ValueError(f"pass@{k} cannot be estimated from {correct} of {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def wilson_interval(proportion: float, problems: int, z: float = 1.959964) -> tuple[float, float]:
    """95% interval of a mean over independent problems whose scores lie in [0, 1] (Wilson 1927).

    A problem is the unit, not a sample: samples of one problem are not independent. For yes/no scores this is Wilson's score
    interval. For scores in between (pass@1 from several samples) it is conservative, because a mean of numbers in [0, 1] has at
    most the variance of yes/no scores with the same mean. It stays inside [0, 1] and is not empty at 0 and 1, as a bootstrap is.
    """
    if problems < 1 or not 0.0 <= proportion <= 1.0:
        raise ValueError(f"no interval for a proportion of {proportion} over {problems} problems")
    shrink = 1.0 + z * z / problems
    centre = (proportion + z * z / (2 * problems)) / shrink
    half = z / shrink * math.sqrt(proportion * (1.0 - proportion) / problems + (z / (2 * problems)) ** 2)
    return max(0.0, centre - half), min(1.0, centre + half)
