"""Engines that span nodes, seen from the trainer.

vLLM's workers on all these nodes are one tensor-parallel group, and the head commands all of them. On its own node the head starts
the workers; on every other node a process starts that node's share. Each node receives the weights for its own workers.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from megatron_r1.errors import EngineLost
from megatron_r1.rollout.channel.announcements import Announcement
from megatron_r1.rollout.channel.engine_channel import EngineChannel, OnPart
from megatron_r1.rollout.channel.local import HOST_MODULE, EngineProcess
from megatron_r1.rollout.channel.remote import ServedEngine
from megatron_r1.rollout.options import NODE_ADDRESS, EngineOptions, Part, engine_environment
from megatron_r1.rollout.sync.links import NodeLink
from megatron_r1.rollout.sync.transfer import WeightTransfer
from megatron_r1.runtime.distributed import failing_together
from megatron_r1.runtime.peers import Peers
from megatron_r1.weights.shard_plan import WeightSource


class FollowingPart:
    """This node's workers of an engine whose head is on another node. It passes them the weights; only the head samples.

    Args:
        peers: this rank, the head's rank and the other nodes'.
        The other arguments are those of `VllmProcessEngine`.

    Raises:
        RolloutError: the engine did not start, here or elsewhere.
    """

    def __init__(self, options: EngineOptions, environment: Mapping[str, str], log_path: Path, threads: int, peers: Peers) -> None:
        meeting = take_part(peers, None)
        needed = engine_environment(options.device, threads, peers.addresses[peers.number])
        self._channel = EngineProcess(HOST_MODULE, log_path, {**environment, **needed})
        try:
            with failing_together(peers.group):
                self._channel.call("follow", options, meeting, timeout=options.start_timeout_seconds)
            self._link = NodeLink(None, options, peers)
        except BaseException:
            self._channel.close()
            raise

    def load_weights(self, weights: WeightSource, version: int, transfer: WeightTransfer) -> None:
        """Feed this node's workers, in step with the head's rank, which feeds those of its node."""
        transfer.send(weights, self._link)

    def sleep(self) -> None:
        """Nothing: the head sends this node's workers to sleep, and wakes them."""

    def close(self) -> None:
        """See `RolloutEngine.close`."""
        self._link.close()
        self._channel.close()


def take_part(peers: Peers, head: EngineChannel | None, timeout: float = 60.0) -> Part:
    """This rank's part of the engine. Collective among the peers.

    Args:
        head: the engine process of the head, on its rank.
    """
    port = None
    try:
        port = None if head is None else head.call("find_port", timeout=timeout)
    finally:
        port = peers.gather(port)[0]
    if port is None:
        raise EngineLost(f"the engine process on {peers.addresses[0]}, which this node's workers follow, has ended")
    return Part(peers.number, peers.addresses[0], port)


class ServedParts:
    """An engine that spans nodes with a rollout server on each, as one `EngineChannel`.

    Args:
        servers: of its nodes, the head's first.
        The other arguments are those of `ServedEngine`.
    """

    def __init__(self, servers: Sequence[Announcement], environment: Mapping[str, str], timeout: float) -> None:
        self._addresses = [_numeric_address(server.host) for server in servers]
        self._channels: list[ServedEngine] = []
        try:
            for server, address in zip(servers, self._addresses, strict=True):
                self._channels.append(ServedEngine(server, {**environment, NODE_ADDRESS: address}, timeout))
        except BaseException:
            self.close()
            raise

    def call(self, name: str, *args: Any, timeout: float | None, on_part: OnPart | None = None, stall: float | None = None) -> Any:
        """See `EngineChannel.call`."""
        head, *others = self._channels
        if name == "start":
            return self._start(*args, timeout=timeout)
        if name == "update_weights" and "contents" in args[0]:
            own, *contents = args[0]["contents"]
            paths = [
                other.call("keep_weights", content, timeout=timeout, stall=stall)
                for other, content in zip(others, contents, strict=True)
            ]
            args = (args[0] | {"contents": [own], "paths": paths},)
        return head.call(name, *args, timeout=timeout, on_part=on_part, stall=stall)

    def close(self, patience: float = 0.0) -> None:
        """See `EngineChannel.close`."""
        for channel in self._channels:
            channel.close(patience)

    def _start(self, options: EngineOptions, timeout: float | None) -> None:
        """Start all nodes at a time, because each waits for the others. If one fails, all are ended."""
        port = self._channels[0].call("find_port", timeout=timeout)
        with ThreadPoolExecutor(len(self._channels)) as threads:
            starts = [
                threads.submit(
                    channel.call, "follow" if node else "start", options, Part(node, self._addresses[0], port), timeout=timeout
                )
                for node, channel in enumerate(self._channels)
            ]
            try:
                for start in wait(starts, return_when=FIRST_EXCEPTION).done:
                    start.result()
            except BaseException:
                self.close()  # the threads' waiting ends with the connections
                raise


def _numeric_address(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise EngineLost(f"the rollout server's host {host} is unknown here: {error.strerror or error}") from None
