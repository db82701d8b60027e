"""Weights from all ranks of a trainer to the workers of its engines, as shards. Collective.

A rank with an engine, or with a part of one that spans nodes, feeds the workers there: bucket by bucket, while these take one, all
ranks write what they hold of the next one. Ranks of the feeding rank's node write into its memory, those of other nodes send.
"""

from __future__ import annotations

import math
import mmap
import os
import secrets
import socket
import stat
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist

from megatron_r1.runtime.distributed import any_rank, failing_together, gather_objects, rank, world_size
from megatron_r1.weights.boxes import box_shape, volume
from megatron_r1.weights.checksum import shard_checksum
from megatron_r1.weights.shard_plan import CHECKSUM_BYTES, FeedPlan, GivenPart, Named, WeightSource, check_names, plan_feed

TOKEN_BYTES = 16
SLOTS = 2  #: buckets of a feeding rank: one that is taken, one that is written


class WeightLink(Protocol):
    """The way from a rank to the workers that it feeds."""

    identity: str  #: another one for every engine that was started
    verifies: bool  #: whether checksums go along
    bucket_bytes: int  #: see `plan_feed`
    device: torch.device  #: of the buckets

    def begin(self) -> tuple[list[list[list[Named]]], list[Named]]:
        """The boxes of the workers of each destination, see `plan_feed`; and those of all workers of the engine.

        Raises:
            RolloutError: the engine is lost.
        """

    def is_unneeded(self, name: str) -> bool:
        """Whether the engine does without this tensor of the trainer."""

    def open_buckets(self, size: int) -> list[str]:
        """Have memory for `SLOTS` buckets. Their paths, if other processes of the node may write into them.

        Raises:
            ConfigError: there is no memory.
        """

    def bucket(self, slot: int) -> torch.Tensor:
        """The bytes of a bucket."""

    def tell_plan(self, plan: FeedPlan) -> None:
        """Tell the workers what they will find in which bucket. Raises RolloutError."""

    def deliver(self, number: int) -> None:
        """Have the workers take bucket `number` out of its slot, `number % SLOTS`. Raises RolloutError."""


@dataclass(frozen=True)
class _Feed:
    """What all ranks know of a rank that feeds."""

    paths: list[str]
    token: bytes  # what the first bucket begins with until all have looked
    buckets: int
    verifies: bool
    device: str


@dataclass
class _Plan:
    """What this rank does in an update."""

    steps: int = 0
    feed: FeedPlan | None = None
    feeds: dict[int, _Feed] = field(default_factory=dict)  # by rank
    to_write: list[list[tuple[int, GivenPart]]] = field(default_factory=list)  # step -> (feeding rank, part)
    mapped: dict[int, list[torch.Tensor]] = field(default_factory=dict)  # feeding rank of this node -> its buckets
    remote: set[int] = field(default_factory=set)  # ranks of other nodes, which send to this one


@dataclass(frozen=True)
class Sent:
    """What a rank fed to workers in one update."""

    plan: FeedPlan
    num_tensors: int  #: of the engine's model
    num_bytes: int  #: of these, each once


class WeightTransfer:
    """Updates, one after the other, of this rank's engine or of other ranks'. It keeps the plan while the layouts stay."""

    def __init__(self) -> None:
        self._told: list[Any] | None = None
        self._plan = _Plan()
        self._sent: Sent | None = None

    def give(self, weights: WeightSource) -> None:
        """Take part in an update of other ranks' engines. Collective with `send`."""
        self._run(weights, None, lambda: None)

    def send(self, weights: WeightSource, link: WeightLink, prepare: Callable[[], None] = lambda: None) -> Sent:
        """Update the workers at the other end of a link. Collective: all ranks call this or `give`.

        Args:
            prepare: what must be done to the engine first; may raise RolloutError.

        Raises:
            WeightSyncError: on every rank: an engine's model has not the trainer's tensors.
            RolloutError: on this rank alone, when the others are done: the engine is lost.
        """
        self._run(weights, link, prepare)
        assert self._sent is not None, "this rank feeds"
        return self._sent

    def _run(self, weights: WeightSource, link: WeightLink | None, prepare: Callable[[], None]) -> None:
        lost: Exception | None = None
        held: tuple[list[list[list[Named]]], list[Named]] | None = None
        with failing_together():
            described = weights.describe()
        if link is not None:
            try:
                prepare()
                held = link.begin()
            except Exception as error:  # noqa: BLE001 - raised when the other ranks are done
                lost, link = error, None
        told = gather_objects((described, socket.gethostname(), None if link is None else (link.identity, link.verifies)))
        if told != self._told:
            self._told = None
            lost = self._make_plan(weights, link, held, told) or lost
            self._told = told if not any_rank(lost is not None)[0] else None
        try:
            lost = self._go_through(weights, link, lost) or lost
        except BaseException:
            self._told = None
            raise
        if lost is not None:
            raise lost

    def _make_plan(
        self,
        weights: WeightSource,
        link: WeightLink | None,
        held: tuple[list[list[list[Named]]], list[Named]] | None,
        told: Sequence[tuple[Any, str, Any]],
    ) -> Exception | None:
        """Plan, and tell every rank and worker its part. Returns the error of an engine that was lost meanwhile."""
        plan = self._plan = _Plan()
        own_host, own_rank, lost = told[rank()][1], rank(), None
        own: _Feed | None = None
        with failing_together():
            if link is not None and held is not None:
                holders = weights.find_holders([described for described, _, _ in told])
                destinations, everything = held
                check_names(everything, holders, link.is_unneeded)
                plan.feed = plan_feed(
                    destinations, holders, lambda at: (at != own_rank, told[at][1] != own_host), link.bucket_bytes
                )
                names = {name for name, _ in everything}
                size = sum(math.prod(holders.shape(name) or ()) * holders.dtype(name).itemsize for name in names)
                self._sent = Sent(plan.feed, len(names), size)
                paths = link.open_buckets(max(plan.feed.largest, TOKEN_BYTES))
                token = secrets.token_bytes(TOKEN_BYTES)
                if paths:
                    link.bucket(0)[:TOKEN_BYTES].copy_(torch.frombuffer(bytearray(token), dtype=torch.uint8))
                own = _Feed(paths, token, len(plan.feed.buckets), link.verifies, str(link.device))
        plan.feeds = {at: feed for at, feed in enumerate(gather_objects(own)) if feed is not None}
        plan.steps = max((feed.buckets for feed in plan.feeds.values()), default=0)
        plan.to_write = [[] for _ in range(plan.steps)]
        for feeder, feed in plan.feeds.items():
            if feeder != own_rank and told[feeder][1] == own_host:
                mapped = _map_buckets(feed)
                if mapped is not None:
                    plan.mapped[feeder] = mapped
            for number, part in _hand_out(plan.feed if feeder == own_rank else None, feeder):
                plan.to_write[number].append((feeder, part))
        reached = gather_objects(sorted(plan.mapped))
        plan.remote = {at for at, feeders in enumerate(reached) if own_rank not in feeders} - {own_rank}
        if link is not None and plan.feed is not None:
            try:
                link.tell_plan(plan.feed)
            except Exception as error:  # noqa: BLE001 - raised when the other ranks are done
                lost = error
        return lost

    def _go_through(self, weights: WeightSource, link: WeightLink | None, lost: Exception | None) -> Exception | None:
        """Write and deliver all buckets. Returns the error of an engine that was lost; a rank that cannot read its part raises."""
        failed: Exception | None = None
        answer: Future[None] | None = None
        with ThreadPoolExecutor(1) as thread:
            for number in range(self._plan.steps):
                failed = self._fill_bucket(weights, link, number) or failed
                lost = _error_of(answer) or lost
                answer = None
                if any_rank(failed is not None)[0]:  # here everybody has written, and every worker taken the bucket before
                    break
                feed = self._plan.feed
                if link is not None and lost is None and feed is not None and number < len(feed.buckets):
                    answer = thread.submit(link.deliver, number)
            lost = _error_of(answer) or lost
        with failing_together():
            if failed is not None:
                raise failed
        return lost

    def _fill_bucket(self, weights: WeightSource, link: WeightLink | None, number: int) -> Exception | None:
        """Write this rank's parts of a bucket of every feeding rank, and receive what other nodes send into this rank's."""
        plan, slot, failed = self._plan, number % SLOTS, None
        under_way: list[Any] = []
        if plan.feed is not None and number < len(plan.feed.buckets):
            for part in plan.feed.buckets[number].parts:
                if part.source in plan.remote:
                    target = _bucket_of(link, slot, plan.feed)[part.start : part.stop]
                    under_way.append(dist.irecv(target, part.source))
        for feeder, part in plan.to_write[number]:
            feed, kept = plan.feeds[feeder], None
            if feeder == rank():
                target = _bucket_of(link, slot, plan.feed)[part.start : part.stop]
            elif feeder in plan.mapped:
                target = plan.mapped[feeder][slot][part.start : part.stop]
            else:
                target = kept = torch.empty(part.stop - part.start, dtype=torch.uint8, device=torch.device(feed.device).type)
            try:
                write_part(part, weights, target, verifies=feed.verifies)
            except Exception as error:  # noqa: BLE001 - raised on every rank when nobody waits for this one
                failed = error
            if kept is not None:
                under_way.append(dist.isend(kept, feeder))
        for transfer in under_way:
            transfer.wait()
        return failed


def write_part(part: GivenPart, weights: WeightSource, target: torch.Tensor, *, verifies: bool) -> None:
    """Write the pieces of a part, and their checksums: of what the source holds, before it is copied.

    Args:
        target: [bytes of the part] uint8.
    """
    with torch.no_grad():
        for piece in part.pieces:
            held = weights.read(piece.name, piece.box).detach()
            size = volume(piece.box) * piece.dtype.itemsize
            place = target[piece.offset : piece.offset + size].view(piece.dtype).view(box_shape(piece.box))
            if verifies:
                held = held.to(piece.dtype).to(target.device).contiguous()
                value = shard_checksum(held)
                signed = torch.tensor([value - (1 << 64) if value >> 63 else value], dtype=torch.int64, device=target.device)
                target[piece.checksum_at : piece.checksum_at + CHECKSUM_BYTES].view(torch.int64).copy_(signed)
            place.copy_(held)


def _error_of(answer: Future[None] | None) -> Exception | None:
    """What a call ended with, which this waits for."""
    error = None if answer is None else answer.exception()
    assert error is None or isinstance(error, Exception)
    return error


def _bucket_of(link: WeightLink | None, slot: int, feed: FeedPlan | None) -> torch.Tensor:
    """A bucket of this rank; memory that nobody reads if its engine is lost, since other ranks go on sending."""
    if link is not None:
        return link.bucket(slot)
    return torch.empty(0 if feed is None else feed.largest, dtype=torch.uint8)


def _hand_out(feed: FeedPlan | None, feeder: int) -> list[tuple[int, GivenPart]]:
    """This rank's parts of a feeding rank's plan, with the numbers of their buckets. Collective; `feed` is that rank's."""
    per_rank: list[list[tuple[int, GivenPart]]] = [[] for _ in range(world_size())]
    for number, bucket in enumerate(feed.buckets if feed is not None else ()):
        for part in bucket.parts:
            per_rank[part.source].append((number, part))
    if world_size() == 1:
        return per_rank[0]
    box: list[Any] = [None]
    dist.scatter_object_list(box, per_rank if rank() == feeder else None, src=feeder)
    return box[0]


def _map_buckets(feed: _Feed) -> list[torch.Tensor] | None:
    """The buckets of a rank on this node; None if its memory cannot be reached from here, as from another container."""
    try:
        mapped = [map_file(path) for path in feed.paths]
    except (OSError, ValueError):
        return None
    if not mapped or bytes(mapped[0][: len(feed.token)].tolist()) != feed.token:
        return None
    return mapped


def map_file(path: str) -> torch.Tensor:
    """The bytes of a file in memory, shared. Raises OSError, or ValueError for what is no such file."""
    with open(path, "r+b", buffering=0) as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise ValueError(f"{path} is no file")
        return torch.frombuffer(mmap.mmap(file.fileno(), found.st_size), dtype=torch.uint8)
