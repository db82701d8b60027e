"""Tokenised documents in Megatron's .bin and .idx files: what an index says, and whether it is whole and of this tokenizer.

Megatron-Core reads the tokens; here is what it checks with bare assertions, or not at all. An index of n sequences and d documents:

    9 bytes MMIDIDX, uint64 version 1, uint8 kind of number, uint64 n, uint64 d + 1,
    n x int32 lengths, n x int64 places in the .bin in bytes, (d + 1) x int64 first sequences of documents, [n x int8 modes]

GPTDataset, and so everything here, calls a sequence a document: for text they are the same.
"""

from __future__ import annotations

import json
import stat
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC = b"MMIDIDX\x00\x00"
_NUMBERS = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}  # Megatron's codes of whole numbers
_PIECE = 1 << 20  # documents that are looked at together: 12 MB
_SAMPLED, _SAMPLED_TOKENS = 64, 4096  # documents, and tokens of each, that are held against a vocabulary


@dataclass(frozen=True)
class TokenFile:
    """A .bin and its .idx. Everything is mapped, nothing is read before it is asked for."""

    prefix: str  #: path without the ending
    dtype: np.dtype  #: of a token
    documents: int  #: sequences, see above
    written_documents: int  #: documents as the writer counted them
    lengths: np.ndarray  #: [documents] int32, tokens of each
    places: np.ndarray  #: [documents] int64, bytes

    @property
    def index_path(self) -> Path:
        """The .idx."""
        return Path(f"{self.prefix}.idx")

    @property
    def tokens_path(self) -> Path:
        """The .bin."""
        return Path(f"{self.prefix}.bin")

    @cached_property
    def tokens(self) -> int:
        """Of all documents."""
        return int(self.places[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def tokens_of(self, documents: range) -> int:
        """Of a stretch of documents."""
        if not documents:
            return 0
        first, last = documents[0], documents[-1]
        return (int(self.places[last]) - int(self.places[first])) // self.dtype.itemsize + int(self.lengths[last])

    def identify(self, go_on: Callable[[], None] = lambda: None) -> str:
        """Checksum of the index, wherever it stands: on it, and on nothing else of the files, depends how rows are cut.

        It reads 12 bytes of each document, by pieces, before each of which it calls `go_on`.
        """
        total = xxhash.xxh3_128()
        total.update(f"{self.dtype.name} {self.documents}\n".encode())
        for array in (self.lengths, self.places):
            for start in range(0, self.documents, _PIECE):
                go_on()
                total.update(array[start : start + _PIECE].tobytes())
        return total.hexdigest()

    def check(self, tokenizer: Tokenizer, go_on: Callable[[], None] = lambda: None) -> str | None:
        """Look at every length and place, and at who wrote the file. It reads 12 bytes of each document, as `identify`.

        Returns:
            A line on what is odd and may be meant.

        Raises:
            DataError: an empty document, places that do not follow from the lengths, or tokens of another tokenizer.
        """
        self._check_documents(go_on)
        sidecar = Path(f"{self.prefix}.json")
        if sidecar.is_file():
            self._check_sidecar(sidecar, tokenizer)
            return None
        return self._check_sample(tokenizer)

    def _check_documents(self, go_on: Callable[[], None]) -> None:
        place = 0
        for start in range(0, self.documents, _PIECE):
            go_on()
            lengths = self.lengths[start : start + _PIECE]
            empty = np.flatnonzero(lengths <= 0)
            if len(empty):
                raise DataError(
                    f"{self.index_path}: document {start + int(empty[0]) + 1} is empty: write the files again without it, as "
                    "`megatron-r1 preprocess` does"
                )
            ends = place + np.cumsum(lengths, dtype=np.int64) * self.dtype.itemsize
            wrong = np.flatnonzero(self.places[start : start + _PIECE] != np.concatenate([[place], ends[:-1]]))
            if len(wrong):
                number = start + int(wrong[0]) + 1
                raise DataError(
                    f"{self.index_path}: document {number} does not begin where the one before it ends: the index is damaged"
                )
            place = int(ends[-1])

    def _check_sidecar(self, path: Path, tokenizer: Tokenizer) -> None:
        try:
            written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            found = {name: written[name] for name in ("tokenizer", "vocab_size", "documents", "tokens", "dtype")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}: does not say how the tokens were made ({type(error).__name__}): preprocess the text again"
            ) from None
        if found["tokenizer"] != tokenizer.fingerprint:
            raise DataError(
                f"{self.prefix}: was tokenised with another tokenizer, of {found['vocab_size']} tokens, than this one of "
                f"{tokenizer.vocab_size}: give that one in data.tokenizer, or preprocess the text again"
            )
        own = {"documents": self.written_documents, "tokens": self.tokens, "dtype": self.dtype.name}
        for name, value in own.items():
            if found[name] != value:
                raise DataError(f"{path}: {name} is {found[name]}, in {self.index_path.name} {value}: they do not belong together")

    def _check_sample(self, tokenizer: Tokenizer) -> str | None:
        """Megatron-LM's files do not say which tokenizer made them: some documents must be of ids that this one has."""
        ended = 0
        numbers = sorted({self.documents * i // _SAMPLED for i in range(_SAMPLED)} | {self.documents - 1})
        for number in numbers:
            tokens = self.read(number)
            check_ids(tokens, tokenizer.vocab_size, lambda number=number: f"{self.prefix}, document {number + 1}")
            ended += int(tokens[-1]) == tokenizer.eos_id
        if ended:
            return None
        return f"{self.prefix}: none of {len(numbers)} documents looked at ends with {tokenizer.eos}: they run into each other"

    def read(self, number: int) -> np.ndarray:
        """The first and the last tokens of a document, whole if it is short."""
        length, place = int(self.lengths[number]), int(self.places[number])
        tokens = np.memmap(self.tokens_path, self.dtype, "r", place, (length,))
        return np.array(tokens if length <= _SAMPLED_TOKENS else np.concatenate([tokens[: _SAMPLED_TOKENS - 1], tokens[-1:]]))


def check_ids(tokens: np.ndarray, vocab_size: int, where: Callable[[], str]) -> None:
    """Raises DataError if a token is none of the vocabulary. Args: `where` says where the tokens stand, if it must."""
    lowest, highest = int(tokens.min()), int(tokens.max())
    if lowest < 0 or highest >= vocab_size:
        wrong = lowest if lowest < 0 else highest
        raise DataError(
            f"{where()}: holds token {wrong}, and the tokenizer has {vocab_size}: it was made with another tokenizer, which "
            "belongs into data.tokenizer"
        )


def open_token_file(prefix: str) -> TokenFile:
    """Map a .bin and its .idx.

    Args:
        prefix: path without the ending.

    Raises:
        DataError: one of them is missing, cut off, no file of Megatron's, or does not belong to the other.
    """
    index, tokens = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    try:
        if not index.exists():
            _refuse_other_names(prefix)
        index_size, tokens_size = _size_of_file(index), _size_of_file(tokens)
        with index.open("rb") as file, tokens.open("rb"):
            header = file.read(_HEADER.size)
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: cannot be read ({error.strerror}): see `megatron-r1 preprocess`") from None
    except ValueError as error:  # of a path that is none
        raise DataError(f"{prefix!r}: cannot be read ({error})") from None
    if len(header) < _HEADER.size or not header.startswith(_MAGIC):
        raise DataError(f"{index}: is no index of tokenised documents (.idx as Megatron writes it)")
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != 1 or code not in _NUMBERS:
        raise DataError(
            f"{index}: is an index of version {version} with numbers of kind {code}; known are version 1 and whole numbers"
        )
    if not sequences or not bounds:
        raise DataError(f"{index}: holds no documents")
    wanted = _HEADER.size + 12 * sequences + 8 * bounds
    if index_size == wanted + sequences:
        raise DataError(f"{index}: holds several modalities; only text is read")
    if index_size != wanted:
        raise DataError(f"{index}: is cut off or damaged: it has {index_size} bytes, and its header says {wanted}")
    lengths = np.memmap(index, np.int32, "r", _HEADER.size, (sequences,))
    places = np.memmap(index, np.int64, "r", _HEADER.size + 4 * sequences, (sequences,))
    firsts = np.memmap(index, np.int64, "r", _HEADER.size + 12 * sequences, (bounds,))
    dtype = np.dtype(_NUMBERS[code])
    end = int(places[-1]) + int(lengths[-1]) * dtype.itemsize
    if tokens_size < end:
        raise DataError(
            f"{tokens}: is cut off: it has {tokens_size} bytes, and {index.name} says {end}; make it again, or copy it whole"
        )
    if tokens_size > end:
        raise DataError(f"{tokens}: has {tokens_size} bytes, and {index.name} says {end}: they do not belong together")
    if firsts[0] != 0 or firsts[-1] != sequences:  # Megatron-Core asserts it
        raise DataError(
            f"{index}: is damaged: its {bounds - 1} documents are of sequences {firsts[0]} to {firsts[-1]}, and it has {sequences}"
        )
    return TokenFile(prefix, dtype, int(sequences), int(bounds) - 1, lengths, places)


def _refuse_other_names(prefix: str) -> None:
    """Raises DataError for what somebody may have named in the place of a prefix."""
    if Path(prefix).suffix in (".bin", ".idx"):
        raise DataError(f"{prefix}: leave out the ending: {prefix[:-4]} stands for the .bin and the .idx together")
    if Path(prefix).is_dir():
        raise DataError(f"{prefix}: is a folder: name a .bin and its .idx in it, without the ending")


def _size_of_file(path: Path) -> int:
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{path}: is no file")
    return found.st_size
