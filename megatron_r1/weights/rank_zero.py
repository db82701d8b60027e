"""Weights that all ranks gather together, for work that only rank 0 does with them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch

from megatron_r1.runtime.distributed import is_rank_zero, on_rank_zero

T = TypeVar("T")


def consume_on_rank_zero(weights: Iterable[tuple[str, torch.Tensor]], work: Callable[[Iterator[tuple[str, torch.Tensor]]], T]) -> T:
    """Give the weights to `work` on rank 0, and return its result or raise its error on every rank. Collective.

    Args:
        weights: each rank's own `gather_weights`; consumed to the end on every rank, also after an error of `work`.
        work: called on rank 0 only.
    """
    remaining = iter(weights)

    def work_and_drain() -> T:
        try:
            return work(remaining)
        finally:  # after an error the other ranks still wait in the collectives of the rest
            _exhaust(remaining)

    if is_rank_zero():
        return on_rank_zero(work_and_drain)
    try:
        _exhaust(remaining)
    finally:  # also after a collective error: rank 0 has the error too and waits for the others to report it
        result = on_rank_zero(work_and_drain)
    return result


def _exhaust(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
    for _ in weights:
        pass
