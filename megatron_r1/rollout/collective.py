"""One engine for a job of many ranks: it lives on rank 0, and all ranks see the same results and the same errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_r1.rollout.protocol import RolloutEngine, SyncReport
from megatron_r1.runtime.distributed import is_rank_zero, on_rank_zero
from megatron_r1.types import Prompt, RolloutGroup, Sampling


class CollectiveEngine:
    """A `RolloutEngine` whose every method is called on every rank.

    Args:
        start: makes the engine; called on rank 0 only. Its error is raised on every rank.
    """

    def __init__(self, start: Callable[[], RolloutEngine]) -> None:
        self._engine: RolloutEngine | None = None

        def keep() -> None:
            self._engine = start()

        on_rank_zero(keep)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> SyncReport:
        """See `RolloutEngine.load_weights`. `weights` is collective: every rank passes its own and all consume it to the end."""
        remaining = iter(weights)

        def load() -> SyncReport:
            try:
                return self._engine.load_weights(remaining, version)
            finally:  # after an error of the engine the other ranks still wait in the collectives of the rest
                _consume(remaining)

        if is_rank_zero():
            return on_rank_zero(load)
        try:
            _consume(remaining)
        finally:  # also after a collective error: rank 0 has it too and waits to tell
            report = on_rank_zero(load)
        return report

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling, seed: int) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`: sampled on rank 0, returned on every rank."""
        return on_rank_zero(lambda: self._engine.generate(prompts, sampling, seed))

    def close(self) -> None:
        """See `RolloutEngine.close`. Not collective: a rank that fails alone can call it."""
        if self._engine is not None:
            self._engine.close()


def _consume(weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for _ in weights:
        pass
