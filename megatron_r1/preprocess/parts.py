"""Parts of the output while it is being made: for each part of a source its tokens, then lengths, in one file, and what it holds.

PREFIX.parts/manifest.json            what the parts are made from
PREFIX.parts/00003-000017.part        tokens, lengths of sequences; in the sentence layout, sequences of documents
PREFIX.parts/00003-000017.left        a JSON object for each document that was left out
PREFIX.parts/00003-000017.json        counts; written last: a part without it is none
PREFIX.parts/.lock                    locked while somebody writes here
"""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from megatron_r1.errors import DataError
from megatron_r1.preprocess.job import PreprocessJob
from megatron_r1.runtime.files import TEMPORARY, write_atomically

_TOKENS, _LEFT, _COUNTS = ".part", ".left", ".json"
LOCK = ".lock"  #: the file in the folder that who writes there has locked
_REMOVED = ".nfs"  # begins the names of what is removed and still open somewhere on NFS
REPEATS = ".repeats"  #: suffix of the documents that are left out as near-duplicates
_LENGTH = np.dtype(np.int32)


@dataclass(frozen=True)
class TokenPart:
    """A finished part of a source."""

    source: int
    number: int
    lines: int  #: that begin in it, of a seekable source; else 0
    is_last: bool  #: of its source
    documents: int
    sequences: int
    tokens: int
    left_out: dict[str, int] = field(default_factory=dict)  #: reason -> documents

    def tokens_path(self, folder: Path) -> Path:
        """Its tokens and lengths."""
        return part_path(folder, self.source, self.number, _TOKENS)

    def left_path(self, folder: Path) -> Path:
        """What it left out."""
        return part_path(folder, self.source, self.number, _LEFT)


def part_path(folder: Path, source: int, number: int, suffix: str) -> Path:
    """A file of a part."""
    return folder / f"{source:05d}-{number:06d}{suffix}"


def read_part(folder: Path, source: int, number: int) -> TokenPart | None:
    """A part that was finished; None if it was not.

    Raises:
        DataError: its counts are damaged.
    """
    path = part_path(folder, source, number, _COUNTS)
    try:
        return TokenPart(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path}: is damaged ({error}): remove {folder} and start again") from None


class PartWriter:
    """Writes one part. `finish` makes it whole; before it there are files with temporary names alone, which `abandon` removes."""

    def __init__(self, folder: Path, source: int, number: int, dtype: np.dtype, sentences: bool, temporary: str) -> None:
        """Args: `temporary` tells this writer's files from those of another that a kill has left."""
        self._folder, self._source, self._number = folder, source, number
        self._dtype, self._sentences, self._suffix = dtype, sentences, f"{TEMPORARY}{temporary}"
        self._lengths, self._counts = array("i"), array("i")
        self._left_out: Counter[str] = Counter()
        self._tokens = self._documents = 0
        self._left: BinaryIO | None = None
        self._file = self._open(_TOKENS)

    def add(self, documents: Sequence[Sequence[int]], tokens: np.ndarray) -> None:
        """Append documents.

        Args:
            documents: the length of each sequence of each document.
            tokens: of all of them, [sum of lengths].
        """
        self._file.write(tokens.astype(self._dtype).tobytes())
        self._tokens += len(tokens)
        self._documents += len(documents)
        for lengths in documents:
            self._lengths.extend(lengths)
            if self._sentences:
                self._counts.append(len(lengths))

    def leave_out(self, number: int, reason: str, detail: str) -> None:
        """Count a document that does not get into the output.

        Args:
            number: of its line or row, as `Unit` has it.
            reason: a word for it.
            detail: what is wrong with it.
        """
        self._left_out[reason] += 1
        if self._left is None:
            self._left = self._open(_LEFT)
        self._left.write(json.dumps([number, reason, detail]).encode() + b"\n")

    def finish(self, lines: int, is_last: bool) -> TokenPart:
        """Make the part whole."""
        part = TokenPart(
            self._source, self._number, lines, is_last, self._documents, len(self._lengths), self._tokens, dict(self._left_out)
        )
        self._file.write(memoryview(self._lengths))
        self._file.write(memoryview(self._counts))
        self._file.close()
        for suffix, file in ((_TOKENS, self._file), (_LEFT, self._left)):
            if file is not None:
                file.close()
                self._temporary(suffix).replace(part_path(self._folder, self._source, self._number, suffix))
        counts = part_path(self._folder, self._source, self._number, _COUNTS)
        write_atomically(counts, json.dumps(asdict(part)) + "\n", durable=False)
        return part

    def abandon(self) -> None:
        """Remove what was written so far."""
        for suffix, file in ((_TOKENS, self._file), (_LEFT, self._left)):
            if file is not None:
                _close_anyhow(file)
                self._temporary(suffix).unlink(missing_ok=True)

    def _temporary(self, suffix: str) -> Path:
        path = part_path(self._folder, self._source, self._number, suffix)
        return path.with_name(path.name + self._suffix)

    def _open(self, suffix: str) -> BinaryIO:
        return self._temporary(suffix).open("wb", buffering=1 << 20)


def _close_anyhow(file: BinaryIO) -> None:
    """A full disk has no room for what is still buffered either."""
    try:
        file.close()
    except OSError:
        pass


def read_lengths(part: TokenPart, folder: Path, dtype: np.dtype, sentences: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of the sequences and numbers of sequences of the documents, [sequences] and [documents] int32.

    Raises:
        DataError: the file is not as long as its counts say.
    """
    path = part.tokens_path(folder)
    counts = part.documents if sentences else 0
    begin = part.tokens * dtype.itemsize
    end = begin + (part.sequences + counts) * _LENGTH.itemsize
    if path.stat().st_size != end:
        raise DataError(f"{path}: has {path.stat().st_size} bytes, not {end}: remove {folder} and start again")
    numbers = np.fromfile(path, _LENGTH, part.sequences + counts, offset=begin)
    return numbers[: part.sequences], numbers[part.sequences :] if sentences else np.ones(part.documents, _LENGTH)


def read_left_out(part: TokenPart, folder: Path) -> list[tuple[int, str, str]]:
    """What `PartWriter.leave_out` noted."""
    if not part.left_out:
        return []
    lines = part.left_path(folder).read_text(encoding="utf-8").split("\n")[:-1]
    noted: list[Any] = [json.loads(line) for line in lines]
    return [(number, reason, detail) for number, reason, detail in noted]


def read_repeats(folder: Path, source: int, number: int) -> dict[int, str]:
    """Which documents of a part, counted from 1 among those that are neither bad nor contaminated, repeat another, and which.

    Raises:
        DataError: they are damaged.
    """
    path = part_path(folder, source, number, REPEATS)
    try:
        return {int(ordinal): where for ordinal, where in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, AttributeError) as error:
        raise DataError(f"{path}: is damaged ({error}): remove {folder} and start again") from None


def remove_parts(job: PreprocessJob) -> None:
    """Remove everything from the folder of parts but the lock.

    Raises:
        DataError: it cannot be removed.
    """
    try:
        for path in job.folder.iterdir():
            if path.name != LOCK and not path.name.startswith(_REMOVED):
                path.unlink()
    except OSError as error:
        raise DataError(f"{job.folder}: cannot be removed ({error.strerror})") from None
