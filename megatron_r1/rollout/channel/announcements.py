"""How trainers find the rollout servers, and how each side authenticates the other.

Each server writes a file into a folder that both see, readable by its owner alone: the address at which it listens, and a key. Both
sides of a connection must prove that they know the key; only then objects are unpickled.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import time
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from pathlib import Path

from megatron_r1.errors import ConfigError, EngineLost

_POLL_SECONDS = 0.5
_HANDSHAKE_SECONDS = 10.0
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # a node that vanished is noticed after two minutes


@dataclass(frozen=True)
class Announcement:
    """One server."""

    number: int  #: from 0
    count: int  #: of all servers that are started together
    host: str
    port: int
    key: str  #: hexadecimal
    pid: int


def announce(folder: Path, announcement: Announcement) -> Path:
    """Write the file of one server and return its path. It replaces the file that an earlier server of that number left."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"engine_{announcement.number:05d}.json"
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(asdict(announcement), file)
    temporary.replace(path)
    return path


def find_servers(folder: Path, timeout: float) -> list[Announcement]:
    """All servers, by number, waiting until the last one is there.

    Raises:
        ConfigError: they are not all there after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        found = [Announcement(**json.loads(path.read_text())) for path in sorted(folder.glob("engine_*.json"))]
        if found and len(found) == found[0].count:
            return found
        if time.monotonic() > deadline:
            wanted = f"{found[0].count}" if found else "any"
            raise ConfigError(
                f"rollout.servers={folder}: {len(found)} of {wanted} rollout servers are there after {timeout:.0f} s; start them "
                f"with megatron-r1 serve-rollouts --announce {folder}, and see their logs"
            )
        time.sleep(_POLL_SECONDS)


def connect(server: Announcement, timeout: float) -> Connection:
    """A connection to a server; both sides have proved that they know the key.

    Raises:
        EngineLost: it cannot be reached, is busy with another trainer for `timeout` seconds, or does not know the key.
    """
    where = f"the rollout server at {server.host}:{server.port}"
    try:
        opened = socket.create_connection((server.host, server.port), timeout=_HANDSHAKE_SECONDS)
    except OSError as error:
        raise EngineLost(f"{where} cannot be reached: {error.strerror or error}") from None
    connection = _prepared(opened)
    try:
        if not connection.poll(timeout):  # it speaks first, when it has closed the connection before
            raise EngineLost(f"{where} is busy with another trainer")
        key = bytes.fromhex(server.key)
        answer_challenge(connection, key)
        deliver_challenge(connection, key)
    except (OSError, EOFError, multiprocessing.AuthenticationError) as error:
        connection.close()
        raise EngineLost(f"{where} did not take the connection: {error}") from None
    except EngineLost:
        connection.close()
        raise
    return connection


def accept(listener: socket.socket, key: bytes) -> Connection | None:
    """The next connection, or None if its other side does not know the key."""
    opened, _ = listener.accept()
    connection = _prepared(opened)
    try:
        deliver_challenge(connection, key)
        if not connection.poll(_HANDSHAKE_SECONDS):
            raise EOFError
        answer_challenge(connection, key)
    except (OSError, EOFError, multiprocessing.AuthenticationError):
        connection.close()
        return None
    return connection


def _prepared(opened: socket.socket) -> Connection:
    opened.settimeout(None)
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return Connection(opened.detach())
