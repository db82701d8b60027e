"""Whose middle stands at its end, in a stream of documents and in token files that are read piece by piece."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.fill_in_middle import MARKS, FilledDocuments, FillInMiddle, count_chosen
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError
from tests.token_sources import with_tokens


@pytest.fixture(scope="module", params=MARKS, ids=lambda marks: marks[0])
def tokenizer(request) -> Tokenizer:
    return with_tokens(*request.param)


def undo(fill: FillInMiddle, tokens: list[int]) -> list[int]:
    """The document that was rearranged."""
    assert tokens[0] == fill.begin
    hole, end = tokens.index(fill.hole), tokens.index(fill.end)
    assert hole < end and len({fill.begin, fill.hole, fill.end}) == 3
    return tokens[1:hole] + tokens[end + 1 :] + tokens[hole + 1 : end]


def test_a_tenth_of_the_documents_has_its_middle_at_the_end(tokenizer) -> None:
    fill = FillInMiddle(tokenizer, 0.1, seed=3)
    changed = 0
    for number in range(4000):
        document = [100_000 + number * 50 + place for place in range(number % 40)]
        found = fill(document, number)
        if found != document:
            changed += 1
            assert len(found) == len(document) + 3 and undo(fill, found) == document
    assert 320 < changed < 460  # of 3,900 that are not empty


def test_it_follows_from_seed_and_number_alone(tokenizer) -> None:
    document = list(range(1000, 1100))
    first, again, other = (FillInMiddle(tokenizer, 0.5, seed) for seed in (0, 0, 1))
    backwards = [again(document, number) for number in reversed(range(50))][::-1]
    assert [first(document, number) for number in range(50)] == backwards
    assert backwards != [other(document, number) for number in range(50)]
    assert first.cut(100, 7) == again.cut(100, 7)
    assert [first.cut(100, 7, epoch) for epoch in range(9)] == [again.cut(100, 7, epoch) for epoch in range(9)]
    assert len({first.cut(100, 7, epoch) for epoch in range(9)}) > 5, "each epoch cuts elsewhere"
    numbers = np.array([*range(500), 2**31 - 1, 2**40], np.uint64)
    assert first.chooses(numbers).tolist() == [first.chooses(int(number)) for number in numbers], "many at once, as one by one"
    elsewhere = FillInMiddle(tokenizer, 0.5, 0, "another source")
    assert 150 < (first.chooses(numbers) != elsewhere.chooses(numbers)).sum() < 350
    fill = FillInMiddle(tokenizer, 1.0, 0)
    assert sorted(fill([5], 0)) == sorted([5, fill.begin, fill.hole, fill.end]) and undo(fill, fill([5], 0)) == [5]
    assert fill([], 0) == []


def test_all_cuts_occur(tokenizer) -> None:
    fill = FillInMiddle(tokenizer, 1.0, 0)
    cuts = {fill.cut(3, number) for number in range(400)}
    assert cuts == {(first, second) for first in range(4) for second in range(first, 4)}


def test_the_stream_keeps_the_documents_and_where_they_begin_and_end(tokenizer) -> None:
    source = load_documents(DataConfig())
    fill = FillInMiddle(tokenizer, 0.5, 0)
    batch = DocumentStream(source, tokenizer, 0, False, 4000, fill_in_middle=fill).micro_batch([0])
    tokens = batch.token_ids[0].tolist()
    ends = [place for place, token in enumerate(tokens) if token == tokenizer.eos_id]
    start, changed = 0, 0
    for number, end in enumerate(ends):
        document = tokens[start:end]
        if document[1] == fill.begin:
            changed += 1
            document = [document[0], *undo(fill, document[1:])]
        assert document == source.encode(number, 0, tokenizer)
        start = end + 1
    assert len(ends) / 3 < changed < len(ends) / 1.5
    plain = DocumentStream(source, tokenizer, 0, False, 64).micro_batch([0]).token_ids
    off = DocumentStream(source, tokenizer, 0, False, 64, fill_in_middle=FillInMiddle(tokenizer, 0.0, 0)).micro_batch([0]).token_ids
    assert plain.equal(off)


class Documents:
    """Documents in memory, as IndexedDataset gives them."""

    def __init__(self, documents: list[list[int]], dtype: str) -> None:
        self._documents = [np.array(document, dtype) for document in documents]
        self.sequence_lengths = np.array([len(document) for document in documents], np.int32)

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> np.ndarray:
        whole = self._documents[idx]
        assert 0 <= offset <= len(whole) and (length is None or 0 <= length <= len(whole) - offset)
        return whole[offset:] if length is None else whole[offset : offset + length]


@pytest.mark.parametrize("rate", [0.3, 1.0])
@pytest.mark.parametrize(("starts", "ends"), [(True, True), (True, False), (False, True), (False, False)])
def test_pieces_of_documents_are_pieces_of_the_whole_ones_between_beginning_and_end(tokenizer, rate, starts, ends) -> None:
    before, after = tokenizer.start_ids if starts else [], [tokenizer.eos_id] if ends else []
    assert before or not starts
    texts = [[100 + place for place in range(number % 9 + (not before and not after))] for number in range(90)]
    documents = Documents([[*before, *text, *after] for text in texts], "uint16")
    fill = FillInMiddle(tokenizer, rate, 5, "source")
    filled = FilledDocuments(documents, fill, 3, tokenizer.start_ids, tokenizer.eos_id)
    lengths = filled.sequence_lengths
    assert lengths.dtype == np.int32
    changed = 0
    for number, text in enumerate(texts):
        whole = filled.get(np.int32(number)).tolist()
        assert len(whole) == lengths[number]
        for first in range(len(whole) + 1):
            for last in range(first, len(whole) + 1):
                assert filled.get(number, first, np.int64(last - first)).tolist() == whole[first:last]
        if lengths[number] == documents.sequence_lengths[number]:
            assert whole == documents.get(number).tolist()
        else:
            changed += 1
            body = whole[len(before) : len(whole) - len(after)]
            assert whole == [*before, *body, *after] and undo(fill, body) == text
            first, second = fill.cut(len(text), number, 3)
            assert body[1 : first + 1] == text[:first] and body[len(body) - (second - first) :] == text[first:second]
    assert changed == count_chosen(fill, documents.sequence_lengths, range(90), len(tokenizer.start_ids), lambda: None)
    assert changed == sum(
        count_chosen(fill, documents.sequence_lengths, part, len(tokenizer.start_ids), lambda: None)
        for part in (range(37), range(37, 90), range(90, 90))
    )
    assert 10 < changed < 40 if rate < 1 else changed >= 60


def test_a_tokenizer_without_the_tokens_is_refused_and_needs_none_at_rate_0() -> None:
    half = with_tokens(*MARKS[0][:2], MARKS[1][2])
    for tokenizer in (train_tally_tokenizer(), half):
        with pytest.raises(ConfigError, match=r"pretrain\.fill_in_middle_rate=0\.1 needs a tokenizer with the tokens"):
            FillInMiddle(tokenizer, 0.1, 0)
        assert FillInMiddle(tokenizer, 0.0, 0)([1, 2, 3], 0) == [1, 2, 3]
