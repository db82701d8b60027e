"""The queue from which a job's engines take the prompts of a batch.

Each rank with an engine takes for itself: a counter that all of them reach says how many prompts are taken, and a prompt's position
in the batch decides its seeds. So who samples a prompt changes when it is sampled, and not what.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True)
class Taken:
    """What an engine gets when it asks for prompts."""

    positions: Sequence[int]  #: in the batch; none: it holds enough for now
    is_last: bool  #: nothing will be left to take


#: Takes the number of prompts that an engine has and has not finished, and gives it more. One that holds none gets some, or all are
#: taken.
Take = Callable[[int], Taken]


def take_all(positions: Sequence[int]) -> Take:
    """For an engine that is alone: all at once."""
    return lambda unfinished: Taken(positions, is_last=True)


class PromptQueue:
    """One rank's end of the queue of a batch; call it as a `Take`.

    An engine gets a part of what is left, so that the parts shrink towards the end, and it never holds more than its share of the
    batch: the one that asks first would otherwise take all prompts if it has room for them.

    Args:
        positions: in the batch, of the prompts to sample; the same on every rank.
        engines: that take from the queue.
        add: adds to the counter of this batch, which begins with 0, and returns its new value.
    """

    def __init__(self, positions: Sequence[int], engines: int, add: Callable[[int], int]) -> None:
        self._positions, self._engines, self._add = positions, engines, add
        self._most = ceil(len(positions) / engines)
        self._left = len(positions)  # at most

    def __call__(self, unfinished: int) -> Taken:
        """See `Take`."""
        size = min(self._most - unfinished, max(1, self._left // (4 * self._engines)))
        if not self._left or size <= 0:
            return Taken((), is_last=not self._left)
        end = self._add(size)
        self._left = max(0, len(self._positions) - end)
        return Taken(self._positions[end - size : end], is_last=not self._left)
