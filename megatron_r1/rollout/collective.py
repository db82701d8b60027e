"""The engines of a job of many ranks: some ranks own an engine, and all ranks see the same results and the same errors."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import Literal, TypeVar

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.multi_node import FollowingPart
from megatron_r1.rollout.prompt_queue import PromptQueue, take_all
from megatron_r1.rollout.protocol import OnGroup, SingleEngine, SyncReport
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.runtime.distributed import SharedCounter, failing_together, gather_objects, rank
from megatron_r1.runtime.peers import Peers
from megatron_r1.types import Prompt, RolloutGroup, Sampling
from megatron_r1.weights.shard_plan import WeightSource

T = TypeVar("T")


class CollectiveEngine:
    """A `RolloutEngine` whose every method is called on every rank.

    The engines take prompts from a queue, so that those which are done sooner sample more; or engine i modulo their number samples
    prompt i. A lost engine is replaced by another one on the same ranks, which receives the weights again; what its predecessor had
    not finished goes back to the queue, or to it.

    Args:
        start: makes this rank's engine, or its part of an engine that spans nodes; None if this rank has none. An error of one rank
            is raised on every rank.
        restarts: how often a call replaces lost engines before it raises EngineLost.
        peers: the ranks that have the other parts of this rank's engine; only the rank of the head samples.
        sleeps: whether `sleep` does anything; the same on all ranks.
        dispatch: `rollout.dispatch`.
    """

    def __init__(
        self,
        start: Callable[[], SingleEngine | FollowingPart] | None,
        restarts: int = 0,
        peers: Peers | None = None,
        *,
        sleeps: bool = False,
        dispatch: Literal["queue", "fixed"] = "queue",
    ) -> None:
        self._start, self._restarts, self._sleeps, self._dispatch = start, restarts, sleeps, dispatch
        self._ranks = (rank(),) if peers is None else peers.ranks
        self._engine: SingleEngine | FollowingPart | None = None
        self._weights: WeightSource | None = None
        self._transfer = WeightTransfer()
        self._version = 0
        self._busy = 0.0  # seconds of the last `generate` in which this rank's engine sampled
        self._idle = 0.0
        self._samples = start is not None and rank() == self._ranks[0]
        flags = gather_objects(self._samples)
        self._count, self._number = flags.count(True), flags[: rank()].count(True)  # this rank's engine's, if it has one
        try:
            with failing_together(is_long=True):
                self._engine = start() if start is not None else None
        except BaseException:
            self.close()
            raise

    @property
    def takes_part(self) -> bool:
        """Whether this rank has an engine, or a part of one, to give weights to."""
        return self._engine is not None

    def metrics(self) -> dict[str, float]:
        """See `RolloutEngine.metrics`."""
        return {"rollout/idle": self._idle}

    def load_weights(self, weights: WeightSource, version: int) -> SyncReport:
        """See `RolloutEngine.load_weights`. Engines that are started later are given the same weights, as they are then."""
        self._weights, self._version = weights, version
        report = self._with_restarts(lambda: self._send(self._engine is not None), sends=True)
        return next(known for known in gather_objects(report) if known is not None)

    def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, seed: int, on_group: OnGroup | None = None
    ) -> list[RolloutGroup]:
        """See `RolloutEngine.generate`. Each rank is given the groups of its own engine; `on_group` is called with them there."""
        groups: dict[int, RolloutGroup] = {}
        take = take_all(())
        self._busy = 0.0

        def queue_unfinished() -> None:
            nonlocal take
            finished = set().union(*gather_objects(list(groups)))
            left = [position for position in range(len(prompts)) if position not in finished]
            if self._count == 1 or self._dispatch == "fixed":
                take = take_all([position for position in left if position % self._count == self._number])
            else:
                take = PromptQueue(left, self._count, SharedCounter().add)

        def sample() -> None:
            if not self._samples:
                return
            started = time.monotonic()
            try:
                groups.update(self._engine.sample(prompts, sampling, seed, take, on_group))
            except EngineLost as error:
                groups.update(error.finished)
                raise
            finally:
                self._busy += time.monotonic() - started

        self._with_restarts(sample, sends=False, prepare=queue_unfinished)
        for position, group in groups.items():
            group.position, group.owner = position, rank()
        return [groups[position] for position in sorted(groups)]

    def sleep(self) -> None:
        """See `RolloutEngine.sleep`. When it returns on a rank, every engine sleeps, so that trainers can take the memory."""
        if self._sleeps:
            self._with_restarts(lambda: self._engine.sleep() if self._engine is not None else None, sends=False)

    def close(self) -> None:
        """See `RolloutEngine.close`. Not collective: a rank that fails alone can call it."""
        if self._engine is not None:
            self._engine.close()

    def _with_restarts(self, work: Callable[[], T], sends: bool, prepare: Callable[[], None] = lambda: None) -> T | None:
        """This rank's result of `work`, which is repeated on ranks that lost their engine, or any part of it, during `work`.

        Args:
            sends: whether `work` itself sends the weights, collectively; otherwise only new engines receive them.
            prepare: called before each attempt, collectively.
        """
        any_lost = own_lost = False
        result: T | None = None
        for restarts_left in range(self._restarts, -1, -1):
            prepare()
            with failing_together(is_long=True):
                if own_lost:
                    self._engine.close()
                    self._engine = self._start()
            error: EngineLost | None = None
            with failing_together(is_long=True):
                try:
                    if any_lost and not sends:
                        self._send(own_lost)
                    result = work()
                except EngineLost as caught:
                    error = caught
            told = gather_objects((None if error is None else str(error), self._busy if self._samples else None))
            losses = [loss for loss, _ in told]
            self._idle = _idle_share([busy for _, busy in told if busy is not None])
            any_lost = any(losses)
            own_lost = self._engine is not None and any(losses[peer] for peer in self._ranks)
            if not any_lost:
                return result
            if not restarts_left:
                raise error or EngineLost(next(filter(None, losses)))
            if error is not None:
                print(f"{error}; starting another one, {restarts_left} more to go", file=sys.stderr, flush=True)
        raise AssertionError("the last round returns or raises")

    def _send(self, receives: bool) -> SyncReport | None:
        """Give this rank's engine the weights if it `receives` them, and other ranks' engines what this rank holds. Collective."""
        assert self._weights is not None, "load_weights comes first"
        if receives and self._engine is not None:
            return self._engine.load_weights(self._weights, self._version, self._transfer)
        self._transfer.give(self._weights)
        return None


def _idle_share(busy: Sequence[float]) -> float:
    """The part of the time until the last engine is done in which the others have nothing to do.

    Args:
        busy: seconds of each engine.
    """
    return 1 - sum(busy) / (len(busy) * max(busy)) if any(busy) else 0.0
