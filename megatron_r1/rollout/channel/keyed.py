"""A connection between nodes that only the two holders of a key can open, read or write: TLS 1.3 with a certificate on both sides.

Both certificates are derived from the key, so nothing but the key has to be told; each side accepts the other's and no third one.
Who relays the bytes can therefore neither read nor change them, cannot play them again (each handshake has fresh keys), and cannot
use one side's proof towards the other. Objects are unpickled only from such a connection.
"""

from __future__ import annotations

import datetime
import os
import pickle
import select
import socket
import ssl
import struct
import threading
import time
from multiprocessing.connection import wait
from typing import Any, Literal, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from megatron_r1.errors import one_line

Role = Literal["server", "trainer"]

KEY_BYTES = 32
_HEADER = struct.Struct("!QI")  # bytes of the pickle; number of buffers, whose lengths and contents follow it
_LENGTH = struct.Struct("!Q")
_FROM, _TO = datetime.datetime(2000, 1, 1), datetime.datetime(9999, 12, 31)  # no clock decides who is trusted


class KeyedConnection:
    """Objects over TLS, with the calls of `multiprocessing.connection.Connection` that are used here.

    A `pickle.PickleBuffer` in a message travels beside the pickle and is not copied; the other side finds a bytearray.
    One thread uses it at a time; `close` may come from another one.
    """

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self._in_use = threading.RLock()
        self._closed = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def poll(self, timeout: float = 0.0) -> bool:
        """Whether something arrives, or the end, within `timeout` seconds. Raises OSError if it is closed here."""
        with self._in_use:
            self._check_open()
            return bool(self._tls.pending() or wait([self._tls], timeout))

    def send(self, message: Any) -> None:
        """Raises OSError."""
        buffers: list[pickle.PickleBuffer] = []
        content = pickle.dumps(message, protocol=5, buffer_callback=buffers.append)
        views = [buffer.raw() for buffer in buffers]
        lengths = b"".join(_LENGTH.pack(view.nbytes) for view in views)
        with self._in_use:
            self._check_open()
            self._tls.sendall(_HEADER.pack(len(content), len(views)) + lengths + content)
            for view in views:
                self._tls.sendall(view)

    def recv(self) -> Any:
        """The next message.

        Raises:
            EOFError: the other side has left, or was cut off in the middle of a message.
            OSError: the connection broke, somebody changed what came over it, or the other side runs another version, whose
                objects are unknown here.
        """
        with self._in_use:
            self._check_open()
            size, count = _HEADER.unpack(self._read(_HEADER.size))
            lengths = [_LENGTH.unpack(self._read(_LENGTH.size))[0] for _ in range(count)]
            content, *buffers = [self._read(length) for length in (size, *lengths)]
        try:
            return pickle.loads(content, buffers=buffers)  # it comes from the holder of the key
        except (pickle.UnpicklingError, AttributeError, ImportError, TypeError, ValueError, LookupError) as error:
            raise OSError(f"a message cannot be read, so the other side runs another version: {one_line(error)}") from None

    def close(self) -> None:
        """End the connection, and what another thread waits for on it. Safe to call twice."""
        self._closed = True
        try:
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)  # the TLS layer stays: nothing is ever read past it
        except OSError:
            pass
        with self._in_use:
            self._tls.close()

    def _check_open(self) -> None:
        if self._closed:
            raise OSError("the connection is closed")

    def _read(self, length: int) -> bytearray:
        content = bytearray(length)
        view, done = memoryview(content), 0
        while done < length:
            count = self._tls.recv_into(view[done:])
            if count == 0:
                raise EOFError
            done += count
        return content


def tls_context(key: bytes, role: Role) -> ssl.SSLContext:
    """TLS for one side of the connections of a key."""
    other: Role = "trainer" if role == "server" else "server"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "server" else ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False  # the certificate itself is known
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_verify_locations(cadata=_certificate(key, other)[1].decode())
    fd = os.memfd_create("megatron_r1-key")  # the module takes a key from a file only; this one has no name on disk
    try:
        os.write(fd, b"".join(_certificate(key, role)))
        context.load_cert_chain(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)
    if role == "server":
        context.num_tickets = 0  # no session is resumed
    return context


def shake_hands(opened: socket.socket, context: ssl.SSLContext, role: Role, seconds: float) -> KeyedConnection:
    """Prove on an open TCP connection that this side knows the key, and have the other side prove it.

    Args:
        opened: taken over, and closed if this fails.
        seconds: for all of it, however slowly the other side speaks.

    Raises:
        OSError: the other side does not know the key, left, or took too long (TimeoutError).
    """
    deadline = time.monotonic() + seconds
    with opened:
        opened.setblocking(False)
        tls = context.wrap_socket(opened, server_side=role == "server", do_handshake_on_connect=False)
    try:
        while True:
            try:
                tls.do_handshake()
                break
            except ssl.SSLWantReadError:
                _wait_for(tls, select.POLLIN, deadline)
            except ssl.SSLWantWriteError:
                _wait_for(tls, select.POLLOUT, deadline)
        tls.setblocking(True)
    except BaseException:
        tls.close()
        raise
    return KeyedConnection(tls)


def _wait_for(tls: ssl.SSLSocket, event: int, deadline: float) -> None:
    poll = select.poll()
    poll.register(tls, event)
    if not poll.poll(max(deadline - time.monotonic(), 0) * 1000):
        raise TimeoutError("no whole handshake in time")


def _certificate(key: bytes, role: Role) -> tuple[bytes, bytes]:
    """Private key and self-signed certificate, both PEM: the same whenever and wherever they are made from this key."""
    seed = HKDF(hashes.SHA256(), 32, salt=None, info=f"megatron_r1 rollouts {role}".encode()).derive(key)
    private = Ed25519PrivateKey.from_private_bytes(seed)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, f"megatron_r1 {role}")])
    certificate = (
        x509.CertificateBuilder(name, name, private.public_key(), 1, _FROM, _TO).sign(private, None)  # Ed25519 hashes by itself
    )
    pem = serialization.Encoding.PEM
    plain = private.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return plain, certificate.public_bytes(pem)
