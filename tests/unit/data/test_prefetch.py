"""Rows are read ahead in a thread that ends when it is told to, and whose errors come when their turn comes."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from megatron_r1.data.documents import DocumentStream, TextDocuments
from megatron_r1.data.prefetch import RowsAhead
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.errors import DataError
from megatron_r1.types import MicroBatch


class Rows:
    """Rows whose only token is their number; row `broken` cannot be read."""

    def __init__(self, broken: int = -1) -> None:
        self.read, self.broken = [], broken

    def micro_batch(self, indices):
        if self.broken in indices:
            raise DataError(f"row {self.broken} cannot be read")
        self.read.append(list(indices))
        tokens = torch.tensor(indices)[:, None]
        return MicroBatch(tokens, tokens, torch.ones(tokens.shape), tokens)

    def name_of(self, micro_batch, row, position):
        return f"row {micro_batch.token_ids[row, position]}"

    def state_dict(self):
        return {"blend": "b"}

    def load_state_dict(self, state):
        assert state == {"blend": "b"}


def plan(updates: int):
    return ([range(4 * i, 4 * i + 2), range(4 * i + 2, 4 * i + 4)] for i in range(updates))


def wait_until(true, seconds=10.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.001)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "rows ahead"]


def test_rows_come_as_planned_and_a_bounded_number_of_updates_ahead():
    rows = Rows()
    with RowsAhead(rows, plan(100), updates=2) as ahead:
        ahead.load_state_dict(rows.state_dict())
        assert not rows.read, "nothing is read before it is known where to begin"
        for update in plan(100):
            for indices in update:
                assert ahead.micro_batch(indices).token_ids[:, 0].tolist() == list(indices)
            used = update[0].start // 4 + 1
            wait_until(lambda used=used: len(rows.read) >= 2 * min(100, used + 2))
            assert len(rows.read) <= 2 * (used + 2 + 1)
        assert ahead.name_of(ahead._rows.micro_batch([7]), 0, 0) == "row 7" and ahead.state_dict() == {"blend": "b"}
        with pytest.raises(AssertionError, match="more rows are asked for"):
            ahead.micro_batch([400])
    assert not threads()


def test_an_error_comes_in_the_step_that_needs_the_row_and_again():
    with RowsAhead(Rows(broken=9), plan(100), updates=4) as ahead:
        for update in plan(2):
            for indices in update:
                ahead.micro_batch(indices)
        for _ in range(2):
            with pytest.raises(DataError, match="row 9 cannot be read"):
                ahead.micro_batch(range(8, 10))
    assert not threads()


@pytest.mark.parametrize("asked", [0, 1, 3])
def test_it_ends_at_once_wherever_it_is(asked):
    began = time.monotonic()
    rows = Rows()
    with pytest.raises(KeyboardInterrupt), RowsAhead(rows, plan(10**9), updates=1) as ahead:
        for update in plan(asked):
            for indices in update:
                ahead.micro_batch(indices)
        raise KeyboardInterrupt
    assert not threads() and time.monotonic() - began < 5
    assert len(rows.read) <= 2 * (asked + 3)


@pytest.mark.parametrize("mask", [False, True])
def test_what_a_stream_saves_is_where_training_is_and_not_where_the_thread_is(mask):
    """Documents that are encoded on demand go on from their own cursor, on this rank behind its own rows."""
    source, tokenizer = TextDocuments([f"{n} + {n} = {2 * n}. " * (n % 7 + 1) for n in range(40)]), train_tally_tokenizer()

    def stream():
        return DocumentStream(source, tokenizer, seed=3, mask_documents=mask, sequence_length=16)

    direct, rows = stream(), stream()
    with RowsAhead(rows, plan(40), updates=3) as ahead:
        assert ahead.state_dict() == direct.state_dict()
        for number, update in enumerate(plan(20), 1):
            for indices in update:
                assert torch.equal(ahead.micro_batch(indices).token_ids, direct.micro_batch(indices).token_ids)
            wait_until(lambda number=number: rows._at >= 64 * min(40, number + 3))
            assert ahead.state_dict() == direct.state_dict() and rows.state_dict() != direct.state_dict()
        saved = ahead.state_dict()
    again = stream()
    with RowsAhead(again, list(plan(40))[20:]) as ahead:
        ahead.load_state_dict(saved)
        for indices in list(plan(21))[20]:
            read, expected = ahead.micro_batch(indices), direct.micro_batch(indices)
            assert torch.equal(read.token_ids, expected.token_ids) and torch.equal(read.labels, expected.labels)
            assert ahead.name_of(read, 0, 5) == direct.name_of(expected, 0, 5)


def test_other_rows_than_planned_are_an_error():
    with (
        RowsAhead(Rows(), plan(3)) as ahead,
        pytest.raises(AssertionError, match="rows \\[0, 1\\] were planned next, rows \\[2, 3\\]"),
    ):
        ahead.micro_batch([2, 3])
