"""The rows of a blend of tokenised sources, on Megatron-Core's BlendedDataset.

BlendedDataset gives every row to the source that lags most behind its weight: which one that is follows from the weights and the
rows before, so that more rows only go on with the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path

import numpy as np

from megatron_r1.data.blend import TokenRow
from megatron_r1.mcore.active import require_active
from megatron_r1.mcore.source_rows import (
    SourcePart,
    SourceRows,
    broken_index,
    build_folder,
    building,
    check_index,
    checksum_of,
    dataset_config,
    writing_into,
)

require_active()

from megatron.core.datasets.blended_dataset import BlendedDataset

_PIECE = 1 << 20  # rows that are looked at together


@dataclass(frozen=True)
class WeightedPart:
    """A source in a blend."""

    name: str  #: for messages
    part: SourcePart
    weight: float  #: of its rows, relative to the others'
    first_row: int = 0  #: of the source's rows; those before it were taken elsewhere


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
            SourceRows(weighted.part, sequence_length, seed, weighted.first_row + share, cache)
            for weighted, share in zip(parts, self._shares(), strict=True)
        ]
        self._firsts = [weighted.first_row for weighted in parts]
        begun = [self._firsts] if any(self._firsts) else []
        self.fingerprint = checksum_of([part.data for part in self._parts], self._weights, *begun)
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
        with writing_into(self._cache):
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
            check_index(self._folder, {"dataset_index": (self._rows,), "dataset_sample_index": (self._rows,)})
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
        tokens, documents, starts = self._parts[source].read(self._firsts[source] + place)
        return TokenRow(tokens, source, documents, starts)

    def ends(self) -> dict[str, int]:
        """What the order of each source follows from -> the number of its first row behind those of this blend.

        It looks at the last rows, until each source was among them.
        """
        if self._blend is None:
            return {self._parts[0].order: self._firsts[0] + self._rows}
        ends, missing = list(self._firsts), set(range(len(self._parts)))
        for stop in range(self._rows, 0, -_PIECE):
            start = max(0, stop - _PIECE)
            sources = self._blend.dataset_index[start:stop]
            for source in list(missing):
                places = np.flatnonzero(sources == source)
                if len(places):
                    ends[source] += int(self._blend.dataset_sample_index[start + int(places[-1])]) + 1
                    missing.remove(source)
            if not missing:
                break
        found: dict[str, int] = {}
        for part, end in zip(self._parts, ends, strict=True):
            found[part.order] = max(end, found.get(part.order, 0))
        return found

    def index_sizes(self) -> dict[str, int]:
        """Name of each index -> its size on disk: those of its sources, and 10 bytes a row to say which source it comes from."""
        sizes = {name: size for part in self._parts for name, size in part.index_sizes().items()}
        return sizes | ({self._folder.name: 10 * self._rows} if len(self._parts) > 1 else {})

    def _map(self, folder: Path, *, is_new: bool) -> BlendedDataset:
        config = dataset_config(self.sequence_length, 0, folder, is_new=is_new)
        return BlendedDataset(self._parts, self._weights, self._rows, config)


def blend_index_bytes(blends: Sequence[BlendRows]) -> int:
    """Size on disk of all indices of some blends, which share those of a source in rows of the same length."""
    sizes = {name: size for blend in blends for name, size in blend.index_sizes().items()}
    return sum(sizes.values())
