"""Updates that a run does not make: weights, moments, average and router biases stay as they were, and the run goes on."""

from __future__ import annotations

import sys

from megatron_r1.errors import NonFiniteUpdate
from megatron_r1.runtime.distributed import is_rank_zero


class LeftOut:
    """Counts them, the same on every rank, and says of each why.

    Attributes:
        total: of the run so far.
        spikes: of these, those whose gradient was finite and too long.

    Args:
        most: updates that are not finite and may be left out; the next one ends the run.
        longest: norm of the gradient above which an update is left out, too; None: none is.
    """

    def __init__(self, most: int, longest: float | None) -> None:
        self._most, self._longest = most, longest
        self.total = self.spikes = 0

    @property
    def reported(self) -> int | None:
        """What metrics say; None: none may be left out."""
        return self.total if self._most or self._longest is not None else None

    def is_spike(self, norm: float) -> bool:
        """Whether the update of a gradient of this norm is left out."""
        return self._longest is not None and norm > self._longest

    def count_spike(self, update: int, norm: float, samples: str) -> None:
        """Args: `samples`: those behind it, in words."""
        self.spikes += 1
        longest = f"optimizer.skip_grad_norm={self._longest:g}"
        self._count(update, f"spike {self.spikes}", f"the norm of its gradient, {norm:.4g}, is above {longest}; {samples}")

    def count_nonfinite(self, update: int, problem: str, mends: bool) -> None:
        """Count an update that is not finite, or end the run.

        Args:
            mends: whether the next update may be better.

        Raises:
            NonFiniteUpdate: it may not be left out.
        """
        before = self.total - self.spikes
        if before >= self._most or not mends:
            way_on = "start from a model whose weights are all finite"
            if mends:
                way_on = f"runtime.skip_nonfinite_updates={self._most} allows no more" if before else (
                    "look at the sample and the learning rate, or let runtime.skip_nonfinite_updates leave such updates out"
                )  # fmt: skip
            raise NonFiniteUpdate(f"update {update} is not finite: {problem}; no weight was changed; {way_on}")
        self._count(update, f"{before + 1} of runtime.skip_nonfinite_updates={self._most}", problem)

    def _count(self, update: int, which: str, why: str) -> None:
        self.total += 1
        if is_rank_zero():
            print(f"update {update} is left out ({which}): {why}", file=sys.stderr, flush=True)
