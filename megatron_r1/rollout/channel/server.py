"""`megatron-r1 serve-rollouts`: holds one rollout engine on this node for trainers on other nodes.

A server serves one trainer at a time. Only the trainer decides about stops (see runtime/interrupt.py): the server ignores SIGUSR1,
and after SIGTERM it leaves once its trainer has left. It starts an engine process for each trainer and ends it with the connection.
So a trainer that was killed and starts again finds a new engine, and a trainer whose engine died gets another one by connecting
again.
"""

from __future__ import annotations

import faulthandler
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_r1.errors import R1Error
from megatron_r1.rollout.channel.announcements import SERVED, Announcement, announce
from megatron_r1.rollout.channel.engine_channel import ASK
from megatron_r1.rollout.channel.keyed import KEY_BYTES, KeyedConnection
from megatron_r1.rollout.channel.local import HOST_MODULE, EngineProcess
from megatron_r1.rollout.channel.reception import Reception, listen_at
from megatron_r1.rollout.sync.memory_file import MemoryFile
from megatron_r1.runtime.launch import LaunchInfo


class _TrainerGone(Exception):
    """The connection broke while something was sent."""


class WeightStore:
    """Weights from the network in an anonymous memory file, in which an engine process of this node finds them."""

    def __init__(self) -> None:
        self._file: MemoryFile | None = None

    def keep(self, content: bytearray) -> str:
        """Put the content of a bucket into the file and return its path."""
        size = max(len(content), 1)
        if self._file is None or len(self._file.bytes) < size:
            self.close()
            self._file = MemoryFile(size)  # workers map it as long as it serves
        if content:
            self._file.bytes[: len(content)].copy_(torch.frombuffer(content, dtype=torch.uint8))
        return self._file.path

    def keep_bucket(self, bucket: dict[str, Any]) -> dict[str, Any]:
        """The bucket with the fields of `vllm.shared_memory.SharedMemoryBucket`: this node's path stands before the others."""
        return {"number": bucket["number"], "paths": [self.keep(bucket["contents"][0]), *bucket.get("paths", [])]}

    def close(self) -> None:
        """Free the memory."""
        if self._file is not None:
            self._file.close()
            self._file = None


def serve_rollouts(folder: Path, launch: LaunchInfo, environment: Mapping[str, str], address: str | None = None) -> None:
    """Announce this server in `folder` and serve until the process is ended.

    Args:
        launch: has the number of this server and the number of all servers.
        environment: of the engine processes.
        address: of this node, at which the server listens and trainers reach it. Default: it listens at all addresses, and trainers
            take the host name.

    Raises:
        ConfigError: the folder is not this user's own, or the address not this machine's.
    """
    key = secrets.token_bytes(KEY_BYTES)
    serving = asked_to_end = False

    def end(*_: object) -> None:
        nonlocal asked_to_end
        asked_to_end = True
        if not serving:
            raise SystemExit(0)

    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, end)
    faulthandler.register(signal.SIGUSR2, all_threads=True)
    listener = listen_at(address)
    with Reception(listener, key) as reception:
        host, port = address or socket.gethostname(), listener.getsockname()[1]
        path = announce(folder, Announcement(launch.rank, launch.world_size, host, port, key.hex(), os.getpid()))
        print(f"serve-rollouts: engine {launch.rank} of {launch.world_size} at {host}:{port}", file=sys.stderr, flush=True)
        log = path.with_suffix(".log")
        try:
            while not asked_to_end:
                with reception.next_trainer() as connection:
                    serving = True
                    serve_trainer(connection, environment, log)
                    serving = False
        finally:
            path.unlink(missing_ok=True)


def serve_trainer(connection: KeyedConnection, environment: Mapping[str, str], log: Path) -> None:
    """Start an engine process and pass on a trainer's calls to it until the trainer closes the connection or is gone.

    The trainer is told that it is served. It sends variables for the process, then (name, args, timeout, stall) for each call, and
    gets what the process answers. The server itself answers one call: `keep_weights` puts the content of a bucket into memory for
    the workers of this node if the engine's head is on another node.
    """
    weights = WeightStore()
    engine = None
    try:
        connection.send(SERVED)
        engine = EngineProcess(HOST_MODULE, log, {**environment, **connection.recv()})
        while True:
            name, args, timeout, stall = connection.recv()
            if name == "keep_weights":
                _send_to_trainer(connection, (True, weights.keep(*args)))
                continue
            if name == "update_weights" and "contents" in args[0]:
                args = (weights.keep_bucket(args[0]),)
            try:
                answer = (
                    True,
                    engine.call(name, *args, timeout=timeout, stall=stall, on_part=lambda part: _pass_on(connection, part)),
                )
            except R1Error as error:
                answer = (False, error)
            _send_to_trainer(connection, answer)
    except (EOFError, OSError, _TrainerGone):
        pass  # it closed the connection, or was killed
    finally:
        if engine is not None:
            engine.close(patience=2.0)
        weights.close()


def _pass_on(connection: KeyedConnection, part: object) -> Any:
    """Send the trainer a part of an answer; the trainer's reply, if the part is a question."""
    _send_to_trainer(connection, (None, part))
    if part != ASK:
        return None
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        raise _TrainerGone from error


def _send_to_trainer(connection: KeyedConnection, message: object) -> None:
    """Send; an error of this connection becomes `_TrainerGone`, so that nobody takes it for an error of the engine."""
    try:
        connection.send(message)
    except OSError as error:
        raise _TrainerGone from error
