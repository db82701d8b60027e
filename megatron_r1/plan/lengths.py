"""Lengths of responses: a log-normal distribution that is cut at the limit, as its quantiles."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np

#: Standard deviation of a length's logarithm where nobody says: of reasoning models' responses to one set of problems. A guess
#: that is used for every published run alike.
USUAL_SPREAD = 0.7


@dataclass(frozen=True)
class ResponseLengths:
    """Tokens of responses, after the limit has cut them."""

    mean: float
    limit: int
    spread: float = USUAL_SPREAD  #: of the logarithm before the cut; 0: all have the mean

    def quantiles(self, count: int) -> np.ndarray:
        """Lengths of `count` responses, one for each equal share of the distribution, ascending; float64, shape [count]."""
        if self.spread == 0 or self.mean >= self.limit:
            return np.full(count, min(self.mean, self.limit), dtype=np.float64)
        return np.minimum(
            np.exp(_median(self.mean / self.limit, self.spread) + self.spread * _normal(count)) * self.limit, self.limit
        )

    def mean_square(self) -> float:
        """Mean of the squared length: what pairs of attention follow."""
        return float(np.mean(self.quantiles(512) ** 2))

    def variation(self) -> float:
        """Standard deviation over the mean."""
        return math.sqrt(max(self.mean_square() / self.mean**2 - 1, 0.0))


@cache
def _normal(count: int) -> np.ndarray:
    normal = NormalDist()
    return np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])


@cache
def _median(mean: float, spread: float) -> float:
    """Logarithm of the median, in shares of the limit, with which lengths have this mean once they are cut at 1."""
    low, high = math.log(mean) - spread**2, 8.0 * spread + 1.0
    for _ in range(60):
        middle = (low + high) / 2
        reached = float(np.mean(np.minimum(np.exp(middle + spread * _normal(512)), 1.0)))
        low, high = (middle, high) if reached < mean else (low, middle)
    return (low + high) / 2
