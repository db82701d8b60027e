"""A rank alone sums nothing; several call torch as ever (tests/distributed run them)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_r1.mcore.collectives import all_reduce


def test_a_group_of_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op, group: called.append((tensor, op, group)))
    numbers = torch.ones(2)
    alone, pair = (SimpleNamespace(size=lambda size=size: size) for size in (1, 2))
    all_reduce(numbers, group=alone)
    assert called == []
    all_reduce(numbers, group=pair)
    all_reduce(numbers, dist.ReduceOp.MAX, group=pair)
    assert called == [(numbers, dist.ReduceOp.SUM, pair), (numbers, dist.ReduceOp.MAX, pair)]
