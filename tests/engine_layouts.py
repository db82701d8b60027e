"""What each worker of an engine holds, by formula; and an engine in memory that takes shards as vLLM's workers do."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator

import torch

from megatron_r1.model.architecture import Architecture
from megatron_r1.model.rows import Split
from megatron_r1.rollout.sync.transfer import SLOTS
from megatron_r1.weights.boxes import Box, along, box_shape, slices_within, volume, whole_box
from megatron_r1.weights.checksum import MASK, shard_checksum
from megatron_r1.weights.mapping import Entry, model_entries
from megatron_r1.weights.shard_plan import CHECKSUM_BYTES, FeedPlan, Named


def engine_entries(arch: Architecture) -> Iterator[Entry]:
    """The table without what an engine does without: layers of multi-token prediction."""
    return (entry for entry in model_entries(arch) if "mtp" not in entry.megatron[0])


def engine_boxes(arch: Architecture, tp: int = 1, dp: int = 1, expert_parallel: bool = False) -> list[list[Named]]:
    """Every worker's boxes: attention over tp, replicated over dp; experts cut over all of them, or placed on them in order."""
    workers: list[list[Named]] = []
    for worker in range(tp * dp):
        boxes: list[Named] = []
        for entry in engine_entries(arch):
            rank, parts = (worker, tp * dp) if entry.expert is not None else (worker % tp, tp)
            if entry.expert is not None and expert_parallel:
                if entry.expert * parts // arch.experts.count != rank:
                    continue
                rank, parts = 0, 1
            boxes += [(name, _shard(entry, shape, rank, parts)) for name, shape in zip(entry.hf, entry.shapes, strict=True)]
        workers.append([named for named in boxes if volume(named[1])])
    return workers


def _shard(entry: Entry, shape: tuple[int, ...], rank: int, parts: int) -> Box:
    if entry.split is Split.REPLICATED:
        return whole_box(shape)
    axis = 1 if entry.split is Split.ROW else 0
    rows = shape[axis] // parts
    if entry.split is Split.VOCAB:  # as vLLM pads it: to a multiple of 64, then divided
        rows = -(-shape[0] // 64) * 64 // parts
    first, stop = (min(at * rows, shape[axis]) for at in (rank, rank + 1))
    return along(shape, axis, first, stop - first)


class MemoryEngine:
    """A `WeightLink` with workers in this process.

    Args:
        workers: what each holds.
        on_bucket: called with the number of each bucket before it is taken; may raise.
    """

    device = torch.device("cpu")
    verifies = True

    def __init__(
        self,
        workers: list[list[Named]],
        dtype: Callable[[str], torch.dtype] = lambda name: torch.float32,
        bucket_bytes: int = 8192,
        on_bucket: Callable[[int], None] = lambda number: None,
    ) -> None:
        self.identity, self.bucket_bytes, self._on_bucket = secrets.token_hex(4), bucket_bytes, on_bucket
        self._workers = workers
        self.held = [{named: torch.zeros(box_shape(named[1]), dtype=dtype(named[0])) for named in worker} for worker in workers]
        self.received = [0] * len(workers)
        self.plans = 0

    def begin(self) -> tuple[list[list[list[Named]]], list[Named]]:
        """All workers read the same region."""
        return [self._workers], [named for worker in self._workers for named in worker]

    def is_unneeded(self, name: str) -> bool:
        """The tests' engines do without layers that no worker holds at all."""
        return all(name != held for worker in self._workers for held, _ in worker)

    def open_buckets(self, size: int) -> list[str]:
        """In this process's memory, which no other can reach: ranks send."""
        self._slots = [torch.zeros(size, dtype=torch.uint8) for _ in range(SLOTS)]
        return []

    def bucket(self, slot: int) -> torch.Tensor:
        """See `WeightLink`."""
        return self._slots[slot]

    def tell_plan(self, plan: FeedPlan) -> None:
        """See `WeightLink`."""
        self.plan, self.plans = plan, self.plans + 1

    def deliver(self, number: int) -> None:
        """Every worker takes its pieces, whose checksums fit."""
        self._on_bucket(number)
        for worker, buckets in enumerate(self.plan.taken[0]):
            for piece in buckets[number]:
                name, box = named = self._workers[worker][piece.index]
                size = volume(piece.box) * piece.dtype.itemsize
                values = (
                    self._slots[number % SLOTS][piece.offset : piece.offset + size].view(piece.dtype).view(box_shape(piece.box))
                )
                told = self._slots[number % SLOTS][piece.checksum_at : piece.checksum_at + CHECKSUM_BYTES].view(torch.int64)
                assert int(told) & MASK == shard_checksum(values), name
                self.held[worker][named][slices_within(piece.box, box)] = values
                self.received[worker] += size + CHECKSUM_BYTES

    def problems(self, whole: Callable[[str], torch.Tensor]) -> list[str]:
        """Tensors of which a worker does not hold its part, bit for bit."""
        return sorted(
            {name for worker in self.held for (name, box), held in worker.items()
             if not torch.equal(held, whole(name)[slices_within(box, whole_box(whole(name).shape))])}
        )  # fmt: skip
