"""The channel between nodes: without the key nobody can speak on it, listen in, change or repeat anything, or block it."""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Client, Connection

import pytest

from megatron_r1 import cli
from megatron_r1.errors import ConfigError, EngineLost
from megatron_r1.rollout.channel import announcements, keyed
from megatron_r1.rollout.channel.announcements import SERVED, Announcement, connect
from megatron_r1.rollout.channel.keyed import KeyedConnection, shake_hands, tls_context
from megatron_r1.rollout.channel.reception import Reception, listen_at
from tests.patience import patient

KEY, OTHER = b"k" * 32, b"o" * 32
SECRET = b"the weights of the model" * 40
LONG = patient(20)


class Server:
    """A reception whose trainers get back what they send; what arrived is kept."""

    def __init__(self, reception: Reception, port: int) -> None:
        self.reception, self.port = reception, port
        self.arrived: list = []
        self.served = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def announcement(self, port: int | None = None, key: bytes = KEY) -> Announcement:
        return Announcement(0, 1, "127.0.0.1", port or self.port, key.hex(), 1)

    def _serve(self) -> None:
        while True:
            with self.reception.next_trainer() as connection:
                try:
                    connection.send(SERVED)
                    self.served += 1
                    while True:
                        self.arrived.append(connection.recv())
                        connection.send(self.arrived[-1])
                except (OSError, EOFError):
                    pass


@pytest.fixture
def server() -> Iterator[Server]:
    listener = listen_at("127.0.0.1")
    with Reception(listener, KEY, seconds=patient(2)) as reception:
        yield Server(reception, listener.getsockname()[1])


@contextmanager
def relay(port: int, change: Callable[[bytes, bool, int], bytes | None]) -> Iterator[int]:
    """A stranger on the way. `change` gets each piece, whether the trainer sent it, and the bytes before; None cuts the line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pass_on(source: socket.socket, target: socket.socket, from_trainer: bool) -> None:
            before = 0
            try:
                while piece := source.recv(1 << 16):
                    changed = change(piece, from_trainer, before)
                    before += len(piece)
                    if changed is None:
                        break
                    target.sendall(changed)
            except OSError:
                pass
            for end in (source, target):
                try:
                    end.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass

        def accept() -> None:
            while True:
                try:
                    trainer, _ = listener.accept()
                except OSError:
                    return
                there = socket.create_connection(("127.0.0.1", port))
                for ends in ((trainer, there, True), (there, trainer, False)):
                    threading.Thread(target=pass_on, args=ends, daemon=True).start()

        threading.Thread(target=accept, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def echo(server: Server, port: int | None = None, message: object = "hello") -> object:
    with connect(server.announcement(port), LONG) as connection:
        connection.send(message)
        return connection.recv()


def pair() -> tuple[KeyedConnection, KeyedConnection]:
    """The two ends of a keyed connection over TCP."""
    with listen_at("127.0.0.1") as listener:
        ours = socket.create_connection(listener.getsockname())
        theirs, _ = listener.accept()
    ends: list[KeyedConnection] = []
    other = threading.Thread(target=lambda: ends.append(shake_hands(theirs, tls_context(KEY, "server"), "server", LONG)))
    other.start()
    ours_keyed = shake_hands(ours, tls_context(KEY, "trainer"), "trainer", LONG)
    other.join()
    return ours_keyed, ends[0]


def test_objects_and_buffers_arrive_as_they_were(server):
    content = bytearray(range(256)) * 1000
    with connect(server.announcement(), LONG) as connection:
        for message in ({"a": [1, None]}, b"", SECRET * 5000, [pickle.PickleBuffer(content), 1, pickle.PickleBuffer(bytearray())]):
            connection.send(message)
            assert connection.poll(LONG)
            answer = connection.recv()
            assert answer == ([content, 1, bytearray()] if isinstance(message, list) else message)
        assert not connection.poll(0)
    with pytest.raises(OSError, match="closed"):
        connection.poll(0)


def test_who_relays_reads_nothing_and_can_repeat_nothing(server):
    seen = {True: b"", False: b""}

    def listen_in(piece: bytes, from_trainer: bool, before: int) -> bytes:
        seen[from_trainer] += piece
        return piece

    with relay(server.port, listen_in) as port:
        assert echo(server, port, SECRET) == SECRET
    assert all(len(part) > len(SECRET) and SECRET[:24] not in part for part in seen.values())
    served, arrived = server.served, len(server.arrived)
    for recorded in (seen[True], seen[False], seen[True][: len(seen[True]) // 2]):
        with socket.create_connection(("127.0.0.1", server.port)) as stranger:
            stranger.settimeout(LONG)
            stranger.sendall(recorded)
            try:
                while stranger.recv(1 << 16):
                    pass
            except ConnectionError:
                pass
    assert echo(server) == "hello"
    assert (server.served, len(server.arrived)) == (served + 1, arrived + 1)


def test_who_stands_between_with_a_key_of_its_own_gets_neither_side(server):
    with Reception(between := listen_at("127.0.0.1"), OTHER) as reception:
        port = between.getsockname()[1]
        with pytest.raises(EngineLost, match="did not take the connection"):
            connect(server.announcement(port), patient(5))
        with pytest.raises(EngineLost, match="did not take the connection"):
            connect(server.announcement(key=OTHER), patient(5))
        assert reception._waiting.empty() and server.served == 0


@pytest.mark.parametrize("impostor", ["trainer", "server"])
def test_a_side_cannot_be_answered_with_its_own_proof(monkeypatch, impostor):
    """Who could play a side's own certificate back at it would still be no other side."""
    own = keyed._certificate
    honest = "server" if impostor == "trainer" else "trainer"
    contexts = {honest: tls_context(KEY, honest)}
    with monkeypatch.context() as patched:
        patched.setattr(keyed, "_certificate", lambda key, role: own(key, honest))
        contexts[impostor] = tls_context(KEY, impostor)
    with listen_at("127.0.0.1") as listener:
        sockets = {"trainer": socket.create_connection(listener.getsockname()), "server": listener.accept()[0]}
    failed = []

    def speak(role: str) -> None:
        try:
            with shake_hands(sockets[role], contexts[role], role, patient(5)) as connection:
                connection.recv()
        except (OSError, EOFError):
            failed.append(role)

    threads = [threading.Thread(target=speak, args=(role,)) for role in sockets]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(failed) == ["server", "trainer"]


@pytest.mark.parametrize("from_trainer", [True, False])
def test_a_changed_byte_ends_the_connection(server, from_trainer):
    def change(piece: bytes, trainer_sent: bool, before: int) -> bytes:
        late = trainer_sent == from_trainer and len(piece) > 1000 and before > 500  # past the handshake
        return piece[:500] + bytes([piece[500] ^ 1]) + piece[501:] if late else piece

    with relay(server.port, change) as port, pytest.raises((OSError, EOFError)):
        echo(server, port, SECRET * 5000)
    assert server.arrived == ([] if from_trainer else [SECRET * 5000])
    assert echo(server) == "hello"


def test_a_message_that_is_cut_off_never_counts(server):
    whole = SECRET * 5000

    def cut(piece: bytes, from_trainer: bool, before: int) -> bytes | None:
        return piece if not from_trainer or before + len(piece) < len(whole) // 2 else None

    with relay(server.port, cut) as port, pytest.raises((OSError, EOFError)):
        echo(server, port, whole)
    assert echo(server) == "hello" and server.arrived == ["hello"]


@pytest.mark.parametrize(
    "said", [b"", b"\x16\x03\x01", b"\x16\x03\x01\x40\x00" + b"x" * 99, b"GET / HTTP/1.1\r\n\r\n", b"\x80\x04N."]
)
def test_silent_clients_and_half_headers_hold_up_nobody(server, said):
    strangers = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(80)]  # more than handshakes at a time
    try:
        for stranger in strangers:
            try:
                stranger.sendall(said)
            except ConnectionError:
                pass  # the oldest ones are given up
        started = time.monotonic()
        assert echo(server) == "hello"
        assert time.monotonic() - started < patient(2), "it waited for a stranger's time to run out"
        with connect(server.announcement(), LONG) as trainer:  # nor do they disturb one who is served
            trainer.send(1)
            assert trainer.recv() == 1
    finally:
        for stranger in strangers:
            stranger.close()


def test_who_drips_is_cut_off_after_the_time_of_a_handshake():
    listener = listen_at("127.0.0.1")
    with Reception(listener, KEY, seconds=0.5), socket.create_connection(listener.getsockname()) as stranger:
        stranger.settimeout(0.1)
        started = time.monotonic()
        ended = False
        while not ended and time.monotonic() - started < patient(10):
            try:
                stranger.sendall(b"\x16" if time.monotonic() - started < 0.05 else b"\x03")
                ended = stranger.recv(100) == b""
            except TimeoutError:
                pass
            except ConnectionError:
                ended = True
        assert ended and time.monotonic() - started < patient(5)


def test_a_silent_server_is_given_up():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        announcement = Announcement(0, 1, "127.0.0.1", listener.getsockname()[1], KEY.hex(), 1)
        kept: list[tuple] = []
        threading.Thread(target=lambda: kept.append(listener.accept()), daemon=True).start()
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(announcements, "HANDSHAKE_SECONDS", 0.3)
            with pytest.raises(EngineLost, match="did not take the connection: no whole handshake in time"):
                connect(announcement, LONG)


def test_the_old_handshake_is_not_answered():
    """HMAC over a nonce alone proves nothing about who is at the other end of a connection."""
    listener = listen_at("127.0.0.1")
    with Reception(listener, KEY, seconds=0.3) as reception:
        with pytest.raises((OSError, EOFError, multiprocessing.AuthenticationError)):
            Client(listener.getsockname(), authkey=KEY)
        assert reception._waiting.empty()


def test_a_second_trainer_waits_for_its_turn(server):
    with connect(server.announcement(), LONG), pytest.raises(EngineLost, match="busy with another trainer"):
        connect(server.announcement(), 0.2)
    assert echo(server) == "hello"


class Newer:
    """A class that the other side's version has not."""

    def __reduce__(self):
        return _made_here, ()


def _made_here() -> None:
    raise AttributeError("no such class")


def test_an_object_of_another_version_ends_the_connection_and_not_the_server(server):
    with pytest.raises((OSError, EOFError)):
        echo(server, message=Newer())
    assert echo(server) == "hello"


def test_closing_ends_what_another_thread_waits_for():
    ours, theirs = pair()
    ended = []

    def wait() -> None:
        try:
            ours.recv()
        except (OSError, EOFError) as error:
            ended.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    time.sleep(0.1)
    ours.close()
    thread.join(LONG)
    assert ended and not thread.is_alive()
    with pytest.raises(EOFError):
        theirs.recv()
    theirs.close()


def test_a_server_listens_at_its_address_alone():
    with listen_at("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", port))
    with listen_at("localhost") as listener:
        assert listener.getsockname()[0] in ("127.0.0.1", "::1")
    with listen_at(None) as listener:
        socket.create_connection(("127.0.0.2", listener.getsockname()[1])).close()
    for wrong in ("192.0.2.1", "no.such.host.invalid", "300.1.1.1", "", "a" * 300):
        with pytest.raises(ConfigError, match="--address .*name an address of this node"):
            listen_at(wrong)


def test_a_wrong_address_is_one_line(capfd, tmp_path):
    assert cli.main(["serve-rollouts", "--announce", str(tmp_path / "engines"), "--address", "192.0.2.1"]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 1 and "--address 192.0.2.1" in lines[0]
    assert not (tmp_path / "engines").exists()


def test_the_key_costs_no_more_time_than_the_copies_that_it_saves():
    """Processor time of both ends for a few buckets, against `Connection`, which has no key and pickles the content."""
    bucket, times = bytearray(32 << 20), 3

    def spent(send: Callable[[object], None], receive: Callable[[], object], message: object) -> float:
        thread = threading.Thread(target=lambda: [receive() for _ in range(times)])
        started = time.process_time()
        thread.start()
        for _ in range(times):
            send(message)
        thread.join()
        return time.process_time() - started

    with listen_at("127.0.0.1") as listener:
        plain = Connection(socket.create_connection(listener.getsockname()).detach()), Connection(listener.accept()[0].detach())
    without = spent(plain[0].send, plain[1].recv, bucket)
    ours, theirs = pair()
    with ours, theirs:
        with_key = spent(ours.send, theirs.recv, pickle.PickleBuffer(bucket))
    for end in plain:
        end.close()
    assert with_key < 1.25 * without, f"{with_key:.2f} s with the key, {without:.2f} s without"
