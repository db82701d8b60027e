"""Fill in the middle on whole documents: prefix, suffix, then the middle (PSM), as DeepSeek-V3 (arXiv 2412.19437) section 4.1.

    <fim begin> prefix <fim hole> suffix <fim end> middle

The form is of Bavarian et al. (arXiv 2207.14255). They cut between characters; V3 does not say where it cuts, and here it is
between tokens, so that the tokens of a document are the same with and without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Protocol, TypeVar

import numpy as np

from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError

#: Begin, hole and end, by the names that published vocabularies have for them.
MARKS = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
)
ADDED = len(MARKS[0])  #: tokens by which a document grows

_PIECE = 1 << 20  # documents that are drawn for together: some 40 MB
_WORD = (1 << 64) - 1
_Numbers = TypeVar("_Numbers", int, np.ndarray)


class FillInMiddle:
    """Moves the middle of some documents to their end. What happens to one depends on seed, source and its number alone.

    Draws are those of SplitMix64 (Steele et al., 2014), by their place: any one is made without those before it, for a million
    documents at once as well.
    """

    def __init__(self, tokenizer: Tokenizer, rate: float, seed: int, source: str = "") -> None:
        """
        Args:
            tokenizer: has one of the sets of `MARKS`.
            rate: share of the documents; 0.1 in V3.
            seed: of the run.
            source: what the documents are of, if numbers of others mean other documents.

        Raises:
            ConfigError: the tokenizer has no such tokens.
        """
        self.rate, self._key = rate, int.from_bytes(hashlib.sha256(f"fill in the middle {seed} {source}".encode()).digest()[:8])
        self._below = int(rate * (1 << 53))
        self.begin = self.hole = self.end = -1
        if not rate:
            return
        sets = [[tokenizer.find_token(mark) for mark in marks] for marks in MARKS]
        complete = [[token for token in ids if token is not None] for ids in sets if None not in ids]
        if not complete:
            raise ConfigError(
                f"pretrain.fill_in_middle_rate={rate} needs a tokenizer with the tokens {' '.join(MARKS[0])}, or "
                f"{' '.join(MARKS[1])}: add them to data.tokenizer, or set the rate to 0"
            )
        self.begin, self.hole, self.end = complete[0]

    def chooses(self, numbers: _Numbers) -> _Numbers:
        """Whether it is done to a document of this number, or to those of many (uint64) at once."""
        return self._draw(numbers, 0) >> 11 < self._below

    def cut(self, length: int, number: int, epoch: int = 0) -> tuple[int, int]:
        """Where the middle of a chosen document of so many tokens begins and ends; in other epochs elsewhere."""
        first, second = sorted(self._draw(number, place, epoch) % (length + 1) for place in (1, 2))
        return first, second

    def __call__(self, tokens: Sequence[int], number: int) -> list[int]:
        """A document's tokens, begin and end of sequence left out: as they are, or three more in the new order.

        Args:
            number: of the document, among all that training reads.
        """
        if not tokens or not self.chooses(number):
            return list(tokens)
        first, second = self.cut(len(tokens), number)
        return [self.begin, *tokens[:first], self.hole, *tokens[second:], self.end, *tokens[first:second]]

    def _draw(self, numbers: _Numbers, place: int, epoch: int = 0) -> _Numbers:
        """64 random bits for each number."""
        key = _mix(self._key + epoch & _WORD)
        return _mix((numbers * 3 + place) * 0x9E3779B97F4A7C15 + key & _WORD)


def _mix(value: _Numbers) -> _Numbers:
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    value = (value ^ value >> 27) * 0x94D049BB133111EB & _WORD
    return value ^ value >> 31


class Documents(Protocol):
    """Numbered documents, as Megatron-Core's IndexedDataset has them."""

    @property
    def sequence_lengths(self) -> np.ndarray:
        """[documents] int32, tokens of each."""

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """`length` tokens of a document from `offset` on; None: to its end."""


class FilledDocuments:
    """Documents of which some have their middle at their end and three tokens more, read piece by piece in any order.

    It is done to whole documents before rows are cut from them, as V3 does: nothing is lost, and a row may begin or end in a part
    of one. A beginning and an end of sequence stay where they are. Which documents are chosen is the same in every epoch, so that
    all have the same number of tokens; where they are cut is not.

    Args:
        documents: as they are.
        fill: what is done to them.
        epoch: decides where they are cut.
        start_ids: that documents may begin with.
        eos_id: that they may end with.
    """

    def __init__(self, documents: Documents, fill: FillInMiddle, epoch: int, start_ids: Sequence[int], eos_id: int) -> None:
        self._documents, self._fill, self._epoch = documents, fill, epoch
        self._start_ids, self._eos_id = list(start_ids), eos_id

    @cached_property
    def sequence_lengths(self) -> np.ndarray:
        """[documents] int32, tokens of each. It takes memory for all of them: who only reads asks `get`."""
        lengths = np.array(self._documents.sequence_lengths)
        for start in range(0, len(lengths), _PIECE):
            piece = lengths[start : start + _PIECE]
            numbers = np.arange(start, start + len(piece))
            piece += ADDED * chosen_of(self._fill, piece, numbers, len(self._start_ids))
        return lengths

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        """See `Documents`."""
        number, size = int(idx), int(self._documents.sequence_lengths[idx])
        if size <= _least(len(self._start_ids)) or not self._fill.chooses(number):
            return self._documents.get(idx, offset=offset, length=length)
        stop = size + ADDED if length is None else offset + int(length)
        at, found = 0, [np.empty(0, np.int64)]
        for part in self._parts(number, size):
            first, last = max(offset - at, 0), min(stop - at, len(part))
            if first < last:
                wanted = part[first:last]
                is_text = isinstance(wanted, range)
                found.append(self._documents.get(idx, offset=wanted.start, length=len(wanted)) if is_text else np.array(wanted))
            at += len(part)
        return np.concatenate(found, dtype=np.int64)

    def _parts(self, number: int, size: int) -> Iterator[range | list[int]]:
        """A chosen document in its new order: ranges of its own tokens, and marks."""
        get, starts = self._documents.get, len(self._start_ids)
        begin = starts if starts and get(number, 0, starts).tolist() == self._start_ids else 0
        end = size - (int(get(number, size - 1, 1)[0]) == self._eos_id)
        first, second = (begin + place for place in self._fill.cut(end - begin, number, self._epoch))
        yield range(begin)
        yield [self._fill.begin]
        yield range(begin, first)
        yield [self._fill.hole]
        yield range(second, end)
        yield [self._fill.end]
        yield range(first, second)
        yield range(end, size)


def _least(starts: int) -> int:
    """Tokens of a document of which nothing may be left between its beginning and its end of sequence."""
    return starts + 1


def chosen_of(fill: FillInMiddle, lengths: np.ndarray, numbers: np.ndarray, starts: int) -> np.ndarray:
    """[documents] bool: to which documents it is done.

    Args:
        lengths: [documents] tokens of each, as they are.
        numbers: [documents] of each.
        starts: how many tokens of beginning of sequence a document may have.
    """
    return fill.chooses(numbers.astype(np.uint64)) & (lengths > _least(starts))


def count_chosen(fill: FillInMiddle, lengths: np.ndarray, documents: range, starts: int, go_on: Callable[[], None]) -> int:
    """To how many documents of a stretch it is done; see `chosen_of`. It reads 4 bytes a document, by pieces, after `go_on`."""
    count = 0
    for start in range(documents.start, documents.stop, _PIECE):
        go_on()
        numbers = np.arange(start, min(start + _PIECE, documents.stop))
        count += int(chosen_of(fill, lengths[numbers[0] : numbers[-1] + 1], numbers, starts).sum())
    return count
