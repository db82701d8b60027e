"""The ways from a rank to the workers that it feeds: through the memory of the node, or over the connection to servers.

The workers' half is `vllm/shared_memory.py`; both halves over NCCL are in `vllm/nccl_transfer.py`.
"""

from __future__ import annotations

import pickle
import secrets
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_r1.rollout.options import EngineOptions
from megatron_r1.rollout.sync.memory_file import MemoryFile
from megatron_r1.rollout.sync.transfer import SLOTS
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.runtime.peers import Peers
from megatron_r1.weights.shard_plan import FeedPlan, Named, TakenPiece

Call = Callable[..., Any]  #: calls a method of the engine by name and waits for it


class EngineLink(ABC):
    """What all links to an engine share; see `transfer.WeightLink`.

    Args:
        call: of the engine; None on a rank that only feeds some of its workers.
    """

    device = torch.device("cpu")

    def __init__(self, call: Call | None, options: EngineOptions) -> None:
        self._call, self._options = call, options
        self.identity = secrets.token_hex(8)
        self.verifies, self.bucket_bytes = options.verify_weights, options.bucket_bytes
        self._workers: list[list[Named]] = []
        self._is_open = False  # whether the engine is in the middle of an update

    def is_unneeded(self, name: str) -> bool:
        """See `WeightLink`."""
        return self._options.is_draft_layer(name)

    def begin(self) -> tuple[list[list[list[Named]]], list[Named]]:
        """See `WeightLink`. What workers hold does not change while they live."""
        self._begin()
        return self._destinations(), [named for worker in self._workers for named in worker]

    def _begin(self) -> None:
        assert self._call is not None, "the engine's head begins"
        if not self._workers:
            self._workers = self._call("call_workers", "weight_boxes")

    def _start(self) -> None:
        """With the first bucket: what goes wrong before does not touch the engine. An update that broke off is ended."""
        assert self._call is not None, "the engine's head starts"
        if self._is_open:
            self._call("finish_weight_update")
        self._call("start_weight_update")
        self._is_open = True

    def finish(self, version: int) -> None:
        """Have the engine use what it was given."""
        assert self._call is not None, "the engine's head finishes"
        self._call("finish_weight_update", str(version))
        self._is_open = False

    @abstractmethod
    def _destinations(self) -> list[list[list[Named]]]:
        """The workers of this rank, by region of its buckets."""

    @abstractmethod
    def open_buckets(self, size: int) -> list[str]:
        """See `WeightLink`."""

    @abstractmethod
    def bucket(self, slot: int) -> torch.Tensor:
        """See `WeightLink`."""

    def tell_plan(self, plan: FeedPlan) -> None:
        """See `WeightLink`."""
        assert self._call is not None, "the engine's head tells"
        self._call("call_workers", "take_plan", [worker for workers in plan.taken for worker in workers], self.verifies)

    @abstractmethod
    def deliver(self, number: int) -> None:
        """See `WeightLink`."""

    def release(self) -> None:
        """Give back, until the next update, what training needs."""

    @abstractmethod
    def close(self) -> None:
        """Free what the link holds. Safe to call twice."""


class _InMemoryFiles(EngineLink):
    """A link whose buckets are memory files of this rank."""

    _files: Sequence[MemoryFile] = ()

    def open_buckets(self, size: int) -> list[str]:
        """See `WeightLink`."""
        self.close()
        self._files = [MemoryFile(size) for _ in range(SLOTS)]
        return [file.path for file in self._files]

    def bucket(self, slot: int) -> torch.Tensor:
        """See `WeightLink`."""
        return self._files[slot].bytes

    def close(self) -> None:
        """See `EngineLink`."""
        for file in self._files:
            file.close()
        self._files = ()


class NodeLink(_InMemoryFiles):
    """To the workers of this rank's node, which map its memory.

    Args:
        call: of the engine, on the rank that has its head.
        peers: the ranks that feed the workers of the engine's other nodes.
    """

    def __init__(self, call: Call | None, options: EngineOptions, peers: Peers | None = None) -> None:
        super().__init__(call, options)
        self._peers = peers
        self._paths: list[list[str]] = []  # slot -> of every node of the engine

    def _begin(self) -> None:
        """The head begins, and tells the other nodes' ranks what all workers hold. Collective among them."""
        if self._peers is None:
            super()._begin()
            return
        with failing_together(self._peers.group):
            if self._call is not None:
                super()._begin()
        known = bool(self._workers)
        if not all(self._peers.gather(known)):
            self._workers = self._peers.gather(self._workers)[0]

    def _destinations(self) -> list[list[list[Named]]]:
        nodes = 1 if self._peers is None else len(self._peers.ranks)
        number = 0 if self._peers is None else self._peers.number
        of_node = len(self._workers) // nodes
        return [self._workers[number * of_node : (number + 1) * of_node]]

    def tell_plan(self, plan: FeedPlan) -> None:
        """See `WeightLink`. Collective among the engine's ranks; the head tells all workers."""
        own = ([file.path for file in self._files], plan.taken[0])
        told: list[tuple[list[str], list[list[list[TakenPiece]]]]] = [own] if self._peers is None else self._peers.gather(own)
        self._paths = [[paths[slot] for paths, _ in told] for slot in range(SLOTS)]
        if self._call is not None:
            self._call("call_workers", "take_plan", [worker for _, workers in told for worker in workers], self.verifies)

    def deliver(self, number: int) -> None:
        """See `WeightLink`. The head's call is to all workers of all nodes."""
        if self._call is not None:
            if number == 0:
                self._start()
            self._call("update_weights", {"number": number, "paths": self._paths[number % SLOTS]})


class ServerLink(_InMemoryFiles):
    """To the workers behind rollout servers. Each bucket goes with the call, to each server its workers' region."""

    def __init__(self, call: Call, options: EngineOptions) -> None:
        super().__init__(call, options)
        self._regions: list[list[tuple[int, int]]] = []

    def _destinations(self) -> list[list[list[Named]]]:
        of_node = len(self._workers) // self._options.nodes
        return [self._workers[at : at + of_node] for at in range(0, len(self._workers), of_node)]

    def tell_plan(self, plan: FeedPlan) -> None:
        """See `WeightLink`."""
        self._regions = [bucket.regions for bucket in plan.buckets]
        super().tell_plan(plan)

    def deliver(self, number: int) -> None:
        """See `WeightLink`."""
        assert self._call is not None, "only heads have servers"
        if number == 0:
            self._start()
        content = memoryview(self.bucket(number % SLOTS).numpy())
        regions = [pickle.PickleBuffer(content[start:stop]) for start, stop in self._regions[number]]  # sent as they are
        self._call("update_weights", {"number": number, "contents": regions})
