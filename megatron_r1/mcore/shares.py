"""Where the arrays of training samples are: each data-parallel rank has its share of them, and none has another's.

Of the ranks that compute a share together (tensor, context and pipeline parallel), one speaks for it: it receives the share from
the ranks that hold it, gives it to its peers, and later reports what came of it.
No Megatron-Core here: `parallel.find_share` knows who is who.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch.distributed as dist

from megatron_r1.data.packing import distribute, distribute_bundles
from megatron_r1.runtime.exchange import broadcast_arrays, gather_numbers, move_arrays
from megatron_r1.types import LOGPROBS, TrainingSample, hollow, round_up

_TOKENS = "token_ids"


@dataclass(frozen=True)
class Place:
    """Where a rank stands in a layout."""

    number: int  #: of its share, its data-parallel rank
    count: int  #: of shares
    speaks: bool  #: it is the one rank of its share that speaks for it; that one is on the last pipeline stage
    is_first: bool  #: pipeline stage
    is_last: bool
    peers: dist.ProcessGroup  #: the ranks of the share, which compute it together


class Shares:
    """The shares of a layout. Every rank makes one, together.

    Attributes:
        number: of this rank's share, its data-parallel rank.
        reports: whether this rank speaks for its share.
    """

    def __init__(self, place: Place) -> None:
        self.number, self.reports = place.number, place.speaks
        self._place = place
        numbers = gather_numbers([self.number if self.reports else -1.0])[:, 0].astype(int).tolist()
        self._speakers = [numbers.index(number) for number in range(place.count)]

    def assign(
        self, samples: Sequence[TrainingSample], batches: Sequence[Sequence[int]], prompts_within: int | None = None,
        multiple: int = 1,
    ) -> list[int]:  # fmt: skip
        """The share of every sample, for minibatches that hold each once: every minibatch is divided evenly by tokens.

        Args:
            samples: of the round.
            batches: minibatches of sample numbers.
            prompts_within: tokens of a micro-batch in which samples of one group share their prompt; None: they do not.
            multiple: of positions that each sequence takes there.
        """
        homes, count = [0] * len(samples), self._place.count
        for batch in batches:
            chosen = [samples[number] for number in batch]
            if prompts_within is None:
                divided = distribute([sample.num_targets for sample in chosen], count)
            else:
                divided = distribute_bundles(chosen, round_up(prompts_within, multiple), count, multiple)
            for number, home in zip(batch, divided, strict=True):
                homes[number] = home
        return homes

    def place(self, samples: Sequence[TrainingSample], homes: Sequence[int]) -> list[TrainingSample]:
        """The samples, with the arrays of those whose home this rank's share is, and `hollow` ones of all others. Collective.

        Samples move from rank to rank in messages of bounded size. Meanwhile a rank has those that it held and those that it gets.
        """
        if not samples or all(sample.home == home for sample, home in zip(samples, homes, strict=True)):
            return list(samples)
        names = [_TOKENS, *(name for name in LOGPROBS if getattr(samples[0], name) is not None)]
        sizes = [[len(getattr(sample, name)) for name in names] for sample in samples]
        speakers = [self._speakers[home] for home in homes]
        moved = move_arrays(
            [sample.holder for sample in samples],
            speakers,
            sizes,
            lambda number: [getattr(samples[number], name) for name in names],
        )
        placed = [_emptied(sample, home, speaker) for sample, home, speaker in zip(samples, homes, speakers, strict=True)]

        def keep(number: int, arrays: Sequence[np.ndarray]) -> None:
            placed[number] = replace(placed[number], here=True, **self._needed(dict(zip(names, arrays, strict=True))))

        if dist.get_world_size(self._place.peers) == 1:
            for number, arrays in moved.items():
                keep(number, arrays)
        else:
            own = [number for number, home in enumerate(homes) if home == self.number]
            broadcast_arrays(own, sizes, moved, self._speakers[self.number], self._place.peers, keep)
        return placed

    def _needed(self, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        """What this rank's pipeline stage computes with: the first one tokens, the last one everything, the others nothing."""
        if self._place.is_last:
            return {name: array if name == _TOKENS else array.view(np.float32) for name, array in arrays.items()}
        return {_TOKENS: arrays[_TOKENS].copy()} if self._place.is_first else {}  # the message's memory is let go


def _emptied(sample: TrainingSample, home: int, holder: int) -> TrainingSample:
    logprobs = {name: hollow(sample.num_targets, np.float32) for name in LOGPROBS if getattr(sample, name) is not None}
    return replace(sample, token_ids=hollow(len(sample.token_ids), np.int32), here=False, home=home, holder=holder, **logprobs)
