from __future__ import annotations

import json

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.documents import DocumentStream, load_documents
from megatron_r1.data.fill_in_middle import MARKS, FillInMiddle
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import ConfigError


def with_tokens(*names: str) -> Tokenizer:
    """The tally's tokenizer with further tokens."""
    tree = json.loads(train_tally_tokenizer().tokenizer_json)
    free = max(token["id"] for token in tree["added_tokens"]) + max(tree["model"]["vocab"].values())
    for number, name in enumerate(names):
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        tree["added_tokens"].append({"id": free + number, "content": name, "special": True, **flags})
    return Tokenizer(json.dumps(tree), "<bos>", "<eos>", "<pad>")


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
    assert first.cuts(100, 7) == again.cuts(100, 7)
    fill = FillInMiddle(tokenizer, 1.0, 0)
    assert sorted(fill([5], 0)) == sorted([5, fill.begin, fill.hole, fill.end]) and undo(fill, fill([5], 0)) == [5]
    assert fill([], 0) == []


def test_all_cuts_occur(tokenizer) -> None:
    fill = FillInMiddle(tokenizer, 1.0, 0)
    cuts = {fill.cuts(3, number) for number in range(400)}
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


def test_a_tokenizer_without_the_tokens_is_refused_and_needs_none_at_rate_0() -> None:
    half = with_tokens(*MARKS[0][:2], MARKS[1][2])
    for tokenizer in (train_tally_tokenizer(), half):
        with pytest.raises(ConfigError, match=r"pretrain\.fill_in_middle_rate=0\.1 needs a tokenizer with the tokens"):
            FillInMiddle(tokenizer, 0.1, 0)
        assert FillInMiddle(tokenizer, 0.0, 0)([1, 2, 3], 0) == [1, 2, 3]
