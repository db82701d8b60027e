"""One engine for a job of many ranks: it lives on rank 0, and all ranks see the same results and the same errors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from megatron_r1.rollout.protocol import OnGroup, RolloutEngine, SyncReport
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from megatron_r1.weights.feed import feed_rank_zero


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
        return feed_rank_zero(weights, lambda fed: self._engine.load_weights(fed, version))

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`: sampled on rank 0, where `on_group` is called, and returned on every rank."""
        return on_rank_zero(lambda: self._engine.generate(prompts, sampling, seed, on_group))

    def close(self) -> None:
        """See `RolloutEngine.close`. Not collective: a rank that fails alone can call it."""
        if self._engine is not None:
            self._engine.close()
