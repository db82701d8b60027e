"""Which samples of several sources make an epoch, and in which order. It depends on sizes, weights and seed alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import lru_cache


class Mixture:
    """An epoch has as many samples as all sources together.

    Without weights it holds every sample once. With weights, source i fills the share w_i / sum(w) of it. A source is passed
    through again and again, in a new order each time, and the next epoch continues where this one stopped. So a source of small
    weight comes in parts and one of large weight several times, and how often two samples of a source were seen differs by at most
    one. The samples of an epoch are shuffled together.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float] | None, seed: int):
        """
        Args:
            sizes: samples of each source.
            weights: positive numbers of any sum, or None.
        """
        self._sizes, self._seed = list(sizes), seed
        total = sum(sizes)
        self.counts = list(sizes) if weights is None else _shares(total, weights)  #: samples of each source in an epoch
        self.epoch_size = total

    def epoch(self, number: int) -> list[tuple[int, int]]:
        """(source, index in it) of every sample of this epoch, in order."""
        chosen = [
            (source, self._stream(source, position))
            for source, count in enumerate(self.counts)
            for position in range(number * count, (number + 1) * count)
        ]
        random.Random(f"mixture {self._seed} epoch {number}").shuffle(chosen)
        return chosen

    def _stream(self, source: int, position: int) -> int:
        passes, offset = divmod(position, self._sizes[source])
        return _order(self._sizes[source], f"mixture {self._seed} source {source} pass {passes}")[offset]


@lru_cache(maxsize=4)
def _order(size: int, seed: str) -> list[int]:
    order = list(range(size))
    random.Random(seed).shuffle(order)
    return order


def _shares(total: int, weights: Sequence[float]) -> list[int]:
    """`total` in parts as the weights say, by largest remainders."""
    exact = [total * weight / sum(weights) for weight in weights]
    counts = [int(share) for share in exact]
    by_remainder = sorted(range(len(weights)), key=lambda i: counts[i] - exact[i])
    for source in by_remainder[: total - sum(counts)]:
        counts[source] += 1
    return counts
