"""Weights over the channel to a rollout server: with the key, against the plain connection that pickled them, and a bare socket.

    python -m benchmarks.channel [--megabytes 64] [--buckets 8] [--repeats N] [--out FILE.json]

Both ends run here. `keyed` is TLS with the buckets beside the pickle; `plain` is multiprocessing.connection, without any key and
with the buckets in the pickle, as the channel was before; `bare` is a socket that only sends and receives.
"""

from __future__ import annotations

import argparse
import pickle
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

from benchmarks.measure import describe_machine, parser_of, positive, print_table, run, write_results
from megatron_r1.rollout.channel.keyed import KeyedConnection, shake_hands, tls_context
from megatron_r1.rollout.channel.reception import listen_at

Ends = tuple[Callable[[Any], object], Callable[[], Any], Callable[[], object]]  #: send, receive, close both
_KEY = bytes(32)
#: of DeepSeek-V3 in BF16. Each of 64 engines gets all of it, over a connection of its own from a rank of its own.
V3_BYTES = 2 * 671_000_000_000


def sync_seconds(bytes_per_second: float, model_bytes: int = V3_BYTES, engines: int = 64, senders: int = 64) -> float:
    """Seconds in which every engine has the weights, if each sender has a network card that is faster than this channel."""
    return model_bytes * -(-engines // senders) / bytes_per_second


def _sockets() -> tuple[socket.socket, socket.socket]:
    with listen_at("127.0.0.1") as listener:
        ours = socket.create_connection(listener.getsockname())
        return ours, listener.accept()[0]


def keyed_ends() -> Ends:
    """The channel of a rollout server."""
    ours, theirs = _sockets()
    found: list[KeyedConnection] = []
    other = threading.Thread(target=lambda: found.append(shake_hands(theirs, tls_context(_KEY, "server"), "server", 10.0)))
    other.start()
    sender = shake_hands(ours, tls_context(_KEY, "trainer"), "trainer", 10.0)
    other.join()
    return lambda bucket: sender.send(pickle.PickleBuffer(bucket)), found[0].recv, lambda: (sender.close(), found[0].close())


def plain_ends() -> Ends:
    """Without a key, pickled."""
    ours, theirs = (Connection(end.detach()) for end in _sockets())
    return ours.send, theirs.recv, lambda: (ours.close(), theirs.close())


def bare_ends(nbytes: int) -> Ends:
    """Nothing but bytes."""
    ours, theirs = _sockets()

    def receive() -> bytearray:
        content = bytearray(nbytes)
        view, done = memoryview(content), 0
        while done < nbytes:
            done += theirs.recv_into(view[done:])
        return content

    return ours.sendall, receive, lambda: (ours.close(), theirs.close())


def measure(ends: Ends, bucket: bytearray, count: int) -> tuple[float, float]:
    """(bytes per second by the clock, seconds of processor time per gigabyte on both ends together)."""
    send, receive, close = ends
    thread = threading.Thread(target=lambda: [receive() for _ in range(count)])
    wall, cpu = time.perf_counter(), time.process_time()
    thread.start()
    for _ in range(count):
        send(bucket)
    thread.join()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    close()
    total = len(bucket) * count
    return total / wall, cpu / total * 1e9


def benchmark(arguments: argparse.Namespace) -> None:
    """Send the same buckets over each in turn."""
    bucket = bytearray(arguments.megabytes << 20)
    kinds: dict[str, Callable[[], Ends]] = {"keyed": keyed_ends, "plain": plain_ends, "bare": lambda: bare_ends(len(bucket))}
    found: dict[str, list[tuple[float, float]]] = {kind: [] for kind in kinds}
    for _ in range(arguments.repeats):
        for kind, open_ends in kinds.items():
            found[kind].append(measure(open_ends(), bucket, arguments.buckets))
    rows = []
    for kind, values in found.items():
        rate, cpu = median(rate for rate, _ in values), median(cpu for _, cpu in values)
        rows.append((kind, f"{rate / 1e9:.2f}", f"{cpu:.2f}", f"{sync_seconds(rate) / 60:.0f}"))
    print_table(("connection", "GB/s", "CPU s/GB, both ends", "minutes for 671B to 64 engines"), rows)
    if arguments.out is not None:
        write_results(arguments.out, arguments, found, describe_machine("cpu"))


def main() -> int:
    """Command line."""
    parser = parser_of(__doc__.split("\n\n")[0], repeats=5)
    parser.add_argument("--megabytes", type=positive, default=64, help="of a bucket")
    parser.add_argument("--buckets", type=positive, default=8, help="of a run")
    return run(benchmark, parser.parse_args())


if __name__ == "__main__":
    raise SystemExit(main())
