"""Training rows from a blend of tokenised sources.

A row is `sequence_length` tokens and the one after them, which is the last one's label: rows share a token. Which tokens are in
row i is decided by the seed, the sources and their weights, and by nothing else: not by how many rows are asked for, by whom, or
how many at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from megatron_r1.data.token_files import check_ids
from megatron_r1.errors import DataError
from megatron_r1.types import MicroBatch


@dataclass(frozen=True)
class TokenRow:
    """The tokens of a row, and where they come from."""

    tokens: np.ndarray  #: [sequence_length + 1] int64
    source: int  #: place in the blend
    documents: np.ndarray  #: [n] numbers in the source
    starts: np.ndarray  #: [n] where in the row each begins; the first one's beginning may be in another row


class NumberedRows(Protocol):
    """Rows by their number, from 0 on. Reading them takes memory for a row alone."""

    sequence_length: int
    fingerprint: str  #: of sources, weights and seed: with the length of a row they decide what each holds
    sources: list[str]  #: names of the sources

    def read(self, number: int) -> TokenRow:
        """A row; any, in any order."""


class BlendedRows:
    """Rows as the trainer asks for them, see `PretrainRows`.

    Attributes:
        reads: whether this rank needs tokens; one that does not gets rows of zeros of the same shape.

    Args:
        rows: to take from.
        eos_id: the token that ends a document.
        vocab_size: ids of the tokenizer.
        mask_documents: keeps attention inside a document; V3 pretraining packs without it (section 4.1).
        first_row: of the phase, if it goes on with the rows of the one before.
        reads: see above.
        order: what the rows of all phases follow from, if others than this one have rows of other sources.
        shorter: likewise, of the runs that this one can have been before phases were added.
    """

    def __init__(
        self,
        rows: NumberedRows,
        *,
        eos_id: int,
        vocab_size: int,
        mask_documents: bool = False,
        first_row: int = 0,
        reads: bool = True,
        order: str | None = None,
        shorter: Collection[str] = (),
    ) -> None:
        self._rows, self._eos_id, self._vocab_size = rows, eos_id, vocab_size
        self._mask_documents, self._first_row = mask_documents, first_row
        self.reads, self._order, self._shorter = reads, order or rows.fingerprint, shorter

    def micro_batch(self, indices: Sequence[int]) -> MicroBatch:
        """The rows of these numbers, with loss on every target.

        Returns:
            Without `mask_documents` [rows, sequence_length]. With it the same rows end to end, [1, rows x sequence_length], with a
            sequence boundary at every row, after every end of sequence, and wherever the source begins another document.

        Raises:
            DataError: a token that the tokenizer does not have.
        """
        count, length = len(indices), self._rows.sequence_length
        numbers = torch.tensor([self._first_row + index for index in indices], dtype=torch.int64)
        documents, loss_mask = numbers[:, None].expand(count, length), torch.ones(count, length)
        positions = torch.arange(length).repeat(count, 1)
        if not self.reads and not self._mask_documents:  # where attention ends is for every pipeline stage to know
            tokens = torch.zeros((1, 1), dtype=torch.int64).expand(count, length)
            return MicroBatch(tokens, tokens, loss_mask, positions, documents=documents)
        read = [self._read(number) for number in numbers.tolist()]
        stream = torch.from_numpy(np.stack([row.tokens for row in read]))
        tokens, labels = stream[:, :-1].contiguous(), stream[:, 1:].contiguous()
        if not self._mask_documents:
            return MicroBatch(tokens, labels, loss_mask, positions, documents=documents)
        is_start = torch.zeros((count, length), dtype=torch.bool)
        is_start[:, 0] = True
        is_start[:, 1:] = tokens[:, :-1] == self._eos_id
        for row, starts in zip(is_start, (row.starts for row in read), strict=True):
            row[torch.from_numpy(starts[starts < length])] = True
        starts = is_start.flatten().nonzero()[:, 0]
        size = count * length
        positions = torch.arange(size) - starts[is_start.flatten().cumsum(0) - 1]
        cu_seqlens = torch.cat([starts, torch.tensor([size])]).to(torch.int32)
        return MicroBatch(
            tokens.view(1, size), labels.view(1, size), loss_mask.view(1, size), positions[None], cu_seqlens,
            sample_ids=list(range(len(starts))), documents=documents.reshape(1, size),
        )  # fmt: skip

    def _read(self, number: int) -> TokenRow:
        row = self._rows.read(number)
        check_ids(row.tokens, self._vocab_size, lambda: self._describe(row, 0, len(row.tokens) - 1))
        return row

    def name_of(self, micro_batch: MicroBatch, row: int, position: int) -> str:
        """The source, and the document of it, at a position of a row."""
        assert micro_batch.documents is not None, "`micro_batch` numbers the rows"
        number = int(micro_batch.documents[row, position])
        at = position % self._rows.sequence_length
        return self._describe(self._rows.read(number), at, at)

    def _describe(self, row: TokenRow, first: int, last: int) -> str:
        places = np.searchsorted(row.starts, [first, last], side="right") - 1
        numbers = [int(row.documents[place]) + 1 for place in range(places[0], places[1] + 1)]
        shown = ", ".join(map(str, numbers[:8])) + (", ..." if len(numbers) > 8 else "")
        return f"{self._rows.sources[row.source]}, document{'s' if len(numbers) > 1 else ''} {shown}"

    def state_dict(self) -> dict[str, Any]:
        """What the order follows from: the same in all phases, and whatever was read, on whichever rank."""
        return {"blend": self._order}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rows come by number, so there is nothing to take up. Raises DataError if the order is not that of the saved run."""
        if state.get("blend") not in (self._order, *self._shorter):
            raise DataError(
                "data.blend: sources, weights, data.split or seed are not those this run began with, so its rows are others; "
                "restore them, or start a new run_dir"
            )
