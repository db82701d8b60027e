"""The server's end of the network: an address of the node, and a handshake for each connection that does not hold up the others."""

from __future__ import annotations

import queue
import socket
import ssl
import threading
import time
from typing import Self

from megatron_r1.errors import ConfigError
from megatron_r1.rollout.channel.announcements import HANDSHAKE_SECONDS, prepare_socket
from megatron_r1.rollout.channel.keyed import KeyedConnection, shake_hands, tls_context

_MOST_HANDSHAKES = 64  # at a time; for one more the oldest is given up, so strangers who say nothing do not keep a trainer out

_PAUSE_SECONDS = 0.1


def listen_at(address: str | None) -> socket.socket:
    """A listening socket at an address of this machine, or at all of its IPv4 addresses.

    Args:
        address: numeric, or a name that this machine resolves to an address of its own.

    Raises:
        ConfigError: it is no address of this machine.
    """
    if address is None:
        return socket.create_server(("", 0))
    try:
        family, _, _, _, place = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM)[0]
        return socket.create_server(place, family=family)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"--address {address}: it cannot be listened at ({reason}); name an address of this node") from None


class Reception:
    """Accepts connections and hands out those whose other side knows the key, one after the other.

    Args:
        listener: closed by `close`.
        key: of this server.
        seconds: for a handshake.
    """

    def __init__(self, listener: socket.socket, key: bytes, seconds: float = HANDSHAKE_SECONDS) -> None:
        self._listener, self._seconds = listener, seconds
        self._context: ssl.SSLContext = tls_context(key, "server")
        self._waiting: queue.SimpleQueue[KeyedConnection] = queue.SimpleQueue()
        self._shaking: dict[int, socket.socket] = {}  # number of a connection -> its socket, oldest first
        self._lock = threading.Lock()
        self._closed = False
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self._accepting.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def next_trainer(self) -> KeyedConnection:
        """The next trainer, waiting for one. It may have left again."""
        return self._waiting.get()

    def close(self) -> None:
        """Stop listening."""
        self._closed = True
        try:
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        except OSError:
            pass
        self._listener.close()

    def _accept(self) -> None:
        number = 0
        while True:
            try:
                opened, _ = self._listener.accept()
            except OSError:
                if self._closed:
                    return
                time.sleep(_PAUSE_SECONDS)  # it left before it was accepted, or strangers hold every descriptor for now
                continue
            number += 1
            with self._lock:
                if len(self._shaking) >= _MOST_HANDSHAKES:
                    _cut(next(iter(self._shaking.values())))
                    del self._shaking[next(iter(self._shaking))]
                # A descriptor of its own: the handshake takes the socket over and may close it at any time.
                self._shaking[number] = opened.dup()
            threading.Thread(target=self._shake_hands, args=(number, opened), daemon=True).start()

    def _shake_hands(self, number: int, opened: socket.socket) -> None:
        try:
            self._waiting.put(shake_hands(prepare_socket(opened), self._context, "server", self._seconds))
        except OSError:
            opened.close()  # a stranger
        finally:
            with self._lock:
                kept = self._shaking.pop(number, None)
            if kept is not None:
                kept.close()


def _cut(kept: socket.socket) -> None:
    try:
        kept.shutdown(socket.SHUT_RDWR)
    except OSError:
        pass
    kept.close()
