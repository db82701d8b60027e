from __future__ import annotations

import pytest
import torch

from megatron_r1.training import validation
from megatron_r1.training.validation import Validation, ValidationRows
from megatron_r1.types import MicroBatch

LENGTH = 4


class Rows:
    def micro_batch(self, indices):
        tokens = torch.tensor(indices)[:, None].expand(len(indices), LENGTH)
        return MicroBatch(tokens, tokens, torch.ones(tokens.shape), tokens)


class Model:
    """A model to which every token of row i costs i nats."""

    reports = True

    def __init__(self) -> None:
        self.calls: list[int] = []

    def evaluate(self, micro_batches, unpack):
        self.calls.append(len(micro_batches))
        found = {}
        for batch in micro_batches:
            found |= unpack(batch, -batch.token_ids.float())
        return found


@pytest.mark.parametrize("count", [1, 5, 8, 13])
@pytest.mark.parametrize(("size", "micro_batch_size", "multiple"), [(1, 4, 1), (2, 2, 1), (2, 1, 2), (4, 1, 1)])
def test_every_row_counts_once_whatever_the_layout(count, size, micro_batch_size, multiple, monkeypatch):
    totals = []
    monkeypatch.setattr(validation, "gather_numbers", lambda numbers: totals.append(numbers[0]) or torch.tensor([[0.0]]))
    calls = []
    for rank in range(size):
        model = Model()
        Validation(model, {"s": ValidationRows(Rows(), count, LENGTH)}, 4, micro_batch_size, rank, size, multiple)()
        calls.append(model.calls)
    assert sum(totals) == LENGTH * sum(range(count))
    assert all(call == calls[0] for call in calls) and all(number % multiple == 0 for number in calls[0])


def test_the_loss_is_that_of_a_token():
    sources = {"a": ValidationRows(Rows(), 5, LENGTH), "b": ValidationRows(Rows(), 1, LENGTH)}
    assert Validation(Model(), sources, 4, 4, 0, 1)() == {"validation/a/loss": 2.0, "validation/b/loss": 0.0}
