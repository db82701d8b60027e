"""Loss on held-out rows, source by source."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from megatron_r1.runtime.exchange import gather_numbers
from megatron_r1.training.protocols import PretrainRows
from megatron_r1.types import MicroBatch


class Evaluable(Protocol):
    """A model that gives log-probs of labels without training on them; all ranks call it together."""

    @property
    def reports(self) -> bool:
        """Whether this rank speaks for its data-parallel share."""

    def evaluate(
        self, micro_batches: Sequence[MicroBatch], unpack: Callable[[MicroBatch, torch.Tensor], dict[int, torch.Tensor]]
    ) -> dict[int, torch.Tensor]:
        """See `MegatronModel.evaluate`."""


@dataclass(frozen=True)
class ValidationRows:
    """What one source is validated with."""

    rows: PretrainRows
    count: int  #: rows, from number 0 on
    sequence_length: int


@dataclass(frozen=True)
class Validation:
    """Measures the loss of a model on rows of several sources. Called by all ranks together.

    Args:
        model: whose log-probs count.
        sources: name -> rows.
        batch_size: rows that all ranks hold together at once.
        micro_batch_size: rows of a forward pass.
        rank: data-parallel rank.
        size: number of data-parallel ranks.
        multiple: of which a rank's number of micro-batches must be one.
    """

    model: Evaluable
    sources: Mapping[str, ValidationRows]
    batch_size: int
    micro_batch_size: int
    rank: int
    size: int
    multiple: int = 1

    def __call__(self) -> dict[str, float]:
        """`validation/<source>/loss`: the mean negative log-likelihood of a token, in nats."""
        return {f"validation/{name}/loss": self._loss(source) for name, source in self.sources.items()}

    def _loss(self, source: ValidationRows) -> float:
        total = 0.0
        for start in range(0, source.count, self.batch_size):
            batches = self._own(source, range(start, min(start + self.batch_size, source.count)))
            numbers = itertools.count()

            def unpack(batch: MicroBatch, logprobs: torch.Tensor, numbers: itertools.count = numbers) -> dict[int, torch.Tensor]:
                return {next(numbers): (logprobs.double() * batch.loss_mask.cpu()).sum()}

            found = self.model.evaluate(batches, unpack)
            if self.model.reports:
                total -= sum(value.item() for value in found.values())
        return gather_numbers([total])[:, 0].sum().item() / (source.count * source.sequence_length)

    def _own(self, source: ValidationRows, batch: range) -> list[MicroBatch]:
        """This rank's micro-batches: as many on every rank, filled up with rows that do not count."""
        per_rank = math.ceil(len(batch) / (self.micro_batch_size * self.size * self.multiple)) * self.multiple
        own = []
        for number in range(self.rank, per_rank * self.size, self.size):
            places = range(number * self.micro_batch_size, (number + 1) * self.micro_batch_size)
            micro_batch = source.rows.micro_batch([batch[place % len(batch)] for place in places])
            counted = max(0, min(self.micro_batch_size, len(batch) - places[0]))
            micro_batch.loss_mask.view(self.micro_batch_size, source.sequence_length)[counted:] = 0
            own.append(micro_batch)
        return own
