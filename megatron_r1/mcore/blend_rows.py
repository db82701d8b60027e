"""The rows of a blend of tokenised sources, on Megatron-Core's BlendedDataset.

BlendedDataset gives every row to the source that lags most behind its weight: which one that is follows from the weights and the
rows before, so that more rows only go on with the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

from megatron_r1.data.blend import TokenRow
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.source_rows import (
    SourcePart,
    SourceRows,
    broken_index,
    build_folder,
    building,
    checksum_of,
    dataset_config,
    index_bytes,
)

require_active()

from megatron.core.datasets.blended_dataset import BlendedDataset


@dataclass(frozen=True)
class WeightedPart:
    """A source in a blend."""

    name: str  #: for messages
    part: SourcePart
    weight: float  #: of its rows, relative to the others'


class BlendRows:
    """Rows of a blend by their number, see `NumberedRows`.

    Args:
        parts: of which each has more tokens than a row.
        sequence_length: tokens of a row.
        seed: of the order.
        rows: that will be read at most.
        cache: folder of the indices. `build` makes what is missing, `open` maps it.
    """

    def __init__(self, parts: Sequence[WeightedPart], sequence_length: int, seed: int, rows: int, cache: Path) -> None:
        self.sequence_length = sequence_length
        self.sources = [weighted.name for weighted in parts]
        total = sum(weighted.weight for weighted in parts)
        self._weights, self._rows, self._cache = [weighted.weight / total for weighted in parts], rows, cache
        self._parts = [
            SourceRows(weighted.part, sequence_length, seed, share, cache)
            for weighted, share in zip(parts, self._shares(), strict=True)
        ]
        self.fingerprint = checksum_of([part.data for part in self._parts], self._weights)
        self._folder = cache / f"blend-{checksum_of([part.order for part in self._parts], self._weights, rows)}"
        self._blend: BlendedDataset | None = None

    def _shares(self) -> list[int]:
        """Rows of each source at most: it gets one while it has at most its weight's share, so never more than one above it."""
        return [ceil(weight * self._rows) + 1 for weight in self._weights]

    def build(self) -> None:
        """Make the indices that are not there yet. One process with a process group does it.

        Raises:
            ConfigError: the folder cannot be written.
        """
        if all(part.is_built for part in self._parts) and (len(self._parts) == 1 or self._folder.is_dir()):
            return
        with building(self._cache):
            for part in self._parts:
                part.build()
            if len(self._parts) > 1:
                build_folder(self._folder, lambda temporary: self._map(temporary, is_new=True))

    def open(self) -> None:
        """Map the indices. Raises DataError if one is not there."""
        for part in self._parts:
            part.open()
        if len(self._parts) > 1:
            try:
                self._blend = self._map(self._folder, is_new=False)
            except (OSError, ValueError) as error:
                raise broken_index(self._folder, error) from None

    def read(self, number: int) -> TokenRow:
        """See `NumberedRows`."""
        assert 0 <= number < self._rows, f"row {number} of {self._rows}"
        source, place = 0, number
        if self._blend is not None:
            source, place = int(self._blend.dataset_index[number]), int(self._blend.dataset_sample_index[number])
        tokens, documents, starts = self._parts[source].read(place)
        return TokenRow(tokens, source, documents, starts)

    def _map(self, folder: Path, *, is_new: bool) -> BlendedDataset:
        config = dataset_config(self.sequence_length, 0, folder, is_new=is_new)
        return BlendedDataset(self._parts, self._weights, self._rows, config)


def blend_index_bytes(parts: Sequence[WeightedPart], sequence_length: int, rows: int) -> int:
    """Size on disk of all indices of a blend: those of its sources, and 10 bytes a row to say which source it comes from."""
    total = sum(weighted.weight for weighted in parts)
    own = (index_bytes(len(w.part.documents), w.part.tokens, sequence_length, ceil(w.weight / total * rows) + 1) for w in parts)
    return sum(own) + (10 * rows if len(parts) > 1 else 0)
