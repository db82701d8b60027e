"""Megatron's indexed datasets by its own code: the head of an .idx, and how Megatron opens a pair of files.

`IndexedDatasetBuilder` keeps a Python number of each sequence, of its place and of each document, about 100 bytes of them together:
of 15T tokens in documents of a thousand some 1.5 TB. So its writer is given the arrays piece by piece here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from megatron_r1.errors import DataError, one_line
from megatron_r1.mcore.active import require_active

require_active()

from megatron.core.datasets.indexed_dataset import IndexedDataset, _IndexWriter

Pieces = Callable[[], Iterator[np.ndarray]]  #: gives whole numbers in order, in arrays of any size; again at each call


def write_token_index(path: Path, dtype: np.dtype, sequences: int, documents: int, lengths: Pieces, counts: Pieces) -> None:
    """Write an .idx, byte for byte as `IndexedDatasetBuilder.finalize` does.

    Args:
        path: the file.
        dtype: of the tokens.
        sequences: how many there are.
        documents: how many there are.
        lengths: of all sequences, in tokens.
        counts: of all documents, in sequences.

    Raises:
        OSError: it cannot be written.
    """
    with _IndexWriter(str(path), dtype.type) as writer:
        file = writer.idx_writer
        file.write(np.array([sequences, documents + 1], "<u8").tobytes())
        for piece in lengths():
            file.write(piece.astype("<i4").tobytes())
        for piece, ends in _with_ends(lengths):
            file.write(((ends - piece) * dtype.itemsize).astype("<i8").tobytes())
        file.write(np.zeros(1, "<i8").tobytes())
        for _, ends in _with_ends(counts):
            file.write(ends.astype("<i8").tobytes())


def check_token_files(prefix: Path) -> None:
    """Open PREFIX.bin and PREFIX.idx as Megatron does, and hold the one against the other.

    Raises:
        DataError: Megatron cannot read them, or they are not of one another.
    """
    try:
        dataset = IndexedDataset(str(prefix))
    except Exception as error:  # noqa: BLE001 - whatever Megatron, struct and numpy raise at a damaged file
        raise DataError(f"{prefix}.idx: Megatron cannot read it ({one_line(error)})") from None
    index = dataset.index
    end = int(index.sequence_pointers[-1]) + int(index.sequence_lengths[-1]) * index.dtype_size
    if end != Path(f"{prefix}.bin").stat().st_size:
        raise DataError(f"{prefix}.bin: has other tokens than {prefix}.idx describes")


def _with_ends(pieces: Pieces) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Each piece, int64, with the sums of all numbers up to each of its own."""
    total = 0
    for piece in pieces():
        wide = piece.astype(np.int64)
        ends = total + np.cumsum(wide)
        total = int(ends[-1]) if len(ends) else total
        yield wide, ends
