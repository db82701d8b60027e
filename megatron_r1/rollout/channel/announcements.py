"""How trainers find the rollout servers: a file of each server in a folder that both see.

The file holds the server's address and the key of its connections (see keyed.py). So it is readable by its owner alone, and
folder and files must belong to the user who reads them: somebody else's file, a symbolic link and an open folder are errors.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from pathlib import Path

from megatron_r1.errors import ConfigError, EngineLost
from megatron_r1.rollout.channel.keyed import KEY_BYTES, KeyedConnection, shake_hands, tls_context

_POLL_SECONDS = 0.5
HANDSHAKE_SECONDS = 10.0  #: for both sides to prove that they know the key
SERVED = "served"  #: a server's first message, when the trainer's turn has come
_KEEPALIVE = {"TCP_KEEPIDLE": 60, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}  # a node that vanished is noticed after two minutes
_LARGEST_FILE = 1 << 16  # bytes


@dataclass(frozen=True)
class Announcement:
    """One server."""

    number: int  #: from 0
    count: int  #: of all servers that are started together
    host: str
    port: int
    key: str  #: hexadecimal
    pid: int

    def check(self) -> str | None:
        """What is wrong with it."""
        numbers = (self.number, self.count, self.port, self.pid)
        if any(type(value) is not int for value in numbers) or type(self.host) is not str or type(self.key) is not str:
            return "a field has the wrong type"
        if not (0 <= self.number < self.count and 0 < self.port < 65536 and self.host):
            return "a number is out of range, or the host is empty"
        try:
            return None if len(bytes.fromhex(self.key)) == KEY_BYTES else f"the key has not {KEY_BYTES} bytes"
        except ValueError:
            return "the key is not hexadecimal"


def announce(folder: Path, announcement: Announcement) -> Path:
    """Write the file of one server and return its path. It replaces the file that an earlier server of that number left.

    Raises:
        ConfigError: the folder is not this user's alone to write into, or cannot be written.
    """
    path = folder / f"engine_{announcement.number:05d}.json"
    temporary = f"{path.name}.tmp-{secrets.token_hex(8)}"  # a name that nobody can have taken
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _own_folder(folder) as folder_fd:
            _check_log(path.with_suffix(".log"), folder_fd)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
            with open(os.open(temporary, flags, 0o600, dir_fd=folder_fd), "w", encoding="utf-8") as file:
                json.dump(asdict(announcement), file)
            try:
                os.replace(temporary, path.name, src_dir_fd=folder_fd, dst_dir_fd=folder_fd)
            except OSError:
                os.unlink(temporary, dir_fd=folder_fd)
                raise
    except OSError as error:
        raise ConfigError(f"--announce {folder}: {path} cannot be written: {error.strerror}") from None
    return path


def find_servers(folder: Path, timeout: float) -> list[Announcement]:
    """All servers, by number, waiting until the last one is there.

    Raises:
        ConfigError: they are not all there after `timeout` seconds, or the folder or a file in it is not this user's own.
    """
    deadline = time.monotonic() + timeout
    while True:
        found = _read_announcements(folder)
        counts = sorted({announcement.count for announcement in found})
        if len(counts) == 1 and [announcement.number for announcement in found] == list(range(counts[0])):
            return found
        if time.monotonic() > deadline:
            wanted = " or ".join(map(str, counts)) or "any"
            stale = "; it also holds files of another start, remove those" if len(counts) > 1 else ""
            raise ConfigError(
                f"rollout.servers={folder}: {len(found)} of {wanted} rollout servers are there after {timeout:.0f} s; start them "
                f"with megatron-r1 serve-rollouts --announce {folder}, and see their logs{stale}"
            )
        time.sleep(_POLL_SECONDS)


def connect(server: Announcement, timeout: float) -> KeyedConnection:
    """A connection to a server; both sides have proved that they know the key.

    Raises:
        EngineLost: it cannot be reached, is busy with another trainer for `timeout` seconds, or does not know the key.
    """
    where = f"the rollout server at {server.host}:{server.port}"
    try:
        opened = socket.create_connection((server.host, server.port), timeout=HANDSHAKE_SECONDS)
    except OSError as error:
        raise EngineLost(f"{where} cannot be reached: {error.strerror or error}") from None
    try:
        connection = shake_hands(
            prepare_socket(opened), tls_context(bytes.fromhex(server.key), "trainer"), "trainer", HANDSHAKE_SECONDS
        )
    except OSError as error:
        raise EngineLost(f"{where} did not take the connection: {error}") from None
    try:
        if not connection.poll(timeout):  # it speaks first, when the trainer before has left
            raise EngineLost(f"{where} is busy with another trainer")
        if connection.recv() != SERVED:
            raise EngineLost(f"{where} speaks another protocol: start it from the same version")
    except (OSError, EOFError) as error:
        connection.close()
        raise EngineLost(f"{where} did not take the connection: {error}") from None
    except EngineLost:
        connection.close()
        raise
    return connection


def prepare_socket(opened: socket.socket) -> socket.socket:
    """The socket, with messages sent at once and a vanished node noticed."""
    opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        opened.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    return opened


def _read_announcements(folder: Path) -> list[Announcement]:
    if not folder.is_symlink() and not folder.exists():
        return []
    found = []
    with _own_folder(folder) as folder_fd:
        for name in sorted(os.listdir(folder_fd)):
            if fnmatch(name, "engine_*.json") and (text := _read_own(folder / name, folder_fd)) is not None:
                found.append(_parse_announcement(text, folder / name))
    return found


def _parse_announcement(text: str, path: Path) -> Announcement:
    try:
        announcement = Announcement(**json.loads(text))
        problem = announcement.check()
    except (ValueError, TypeError, RecursionError) as error:
        problem = " ".join(str(error).split())
    if problem:
        raise ConfigError(f"{path} is no announcement of a rollout server ({problem}): remove it")
    return announcement


@contextmanager
def _own_folder(folder: Path) -> Iterator[int]:
    """A descriptor of the folder, which belongs to this user and into which nobody else may write."""
    try:
        folder_fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR):
            kind = "a symbolic link, which is not followed" if folder.is_symlink() else "no folder"
            raise ConfigError(f"{folder} is {kind}: name the folder itself") from None
        raise ConfigError(f"{folder} cannot be opened: {error.strerror}") from None
    try:
        found = os.fstat(folder_fd)
        _check_owner(folder, found)
        if found.st_mode & 0o022:
            raise ConfigError(f"others may write into {folder}, and so announce servers of their own: run chmod go-w {folder}")
        yield folder_fd
    finally:
        os.close(folder_fd)


def _read_own(path: Path, folder_fd: int) -> str | None:
    """The content of a file of the folder; None if it has just gone."""
    try:
        fd = os.open(path.name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder_fd)
    except FileNotFoundError:
        return None
    except OSError as error:
        reason = "it is a symbolic link, which is not followed" if error.errno == errno.ELOOP else error.strerror
        raise ConfigError(f"{path} cannot be read: {reason}") from None
    try:
        found = os.fstat(fd)
        _check_owner(path, found)
        if not stat.S_ISREG(found.st_mode) or found.st_size > _LARGEST_FILE:
            raise ConfigError(f"{path} is no announcement of a rollout server: remove it")
        if found.st_mode & 0o077:
            raise ConfigError(f"others may read {path}, and so know its key: end that server, remove the file and start it again")
        return os.read(fd, _LARGEST_FILE).decode("utf-8", errors="replace")
    finally:
        os.close(fd)


def _check_owner(path: Path, found: os.stat_result) -> None:
    if found.st_uid != os.geteuid():
        raise ConfigError(f"{path} belongs to user {found.st_uid}, not to you (user {os.geteuid()}): use a folder of your own")


def _check_log(path: Path, folder_fd: int) -> None:
    """The engine's output goes to this file; it is appended to what an earlier server left, not to what a link points to."""
    try:
        found = os.stat(path.name, dir_fd=folder_fd, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path} is no plain file, and the engine's log would go there: remove it")
    _check_owner(path, found)
