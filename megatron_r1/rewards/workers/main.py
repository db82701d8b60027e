"""Main program of a scoring worker: it scores what comes over an inherited socket until the socket closes.

Run as `python -m megatron_r1.rewards.workers.main SOCKET_FD PARENT_PID`. Messages are JSON in both directions: the parent unpickles
nothing that comes from a process that parses hostile text.

    parent: {"scorers": {name: [target, settings]}, "memory_bytes": n, "recycle_bytes": n}, then batches:
            [[id, name, response, reference], ...]
    worker: ["ready"] or ["broken", why], then ["started"] for a batch, and ["done", id, verdict, refused, leaves] for each item;
            refused: the scorer says that it cannot work here; leaves: the worker has grown too large and ends
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from dataclasses import asdict
from multiprocessing.connection import Connection
from typing import Any

from megatron_r1.errors import R1Error, RewardError
from megatron_r1.rewards.protocol import Scorer, Verdict
from megatron_r1.rewards.scorers import build_scorer

_PR_SET_PDEATHSIG = 1
_PAGE_BYTES = resource.getpagesize()
_DETAIL_CHARACTERS = 300


def work(socket_fd: int, parent_pid: int) -> None:
    """Build the scorers of the first message, then score batches."""
    _end_with(parent_pid)
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):  # Slurm signals all processes of a step: the rank decides
        signal.signal(number, signal.SIG_IGN)
    if os.getcwd() not in sys.path:  # where a user's scorers are; behind Python's own modules
        sys.path.append(os.getcwd())
    connection = Connection(socket_fd)
    try:
        start = json.loads(connection.recv_bytes())
        limit_memory(start["memory_bytes"])
        try:
            scorers = {name: build_scorer(target, settings) for name, (target, settings) in start["scorers"].items()}
        except R1Error as error:
            _send_message(connection, ["broken", str(error)])
            return
        _send_message(connection, ["ready"])
        while True:
            batch = json.loads(connection.recv_bytes())
            _send_message(connection, ["started"])
            for item, name, response, reference in batch:
                verdict, refused = score_one(scorers[name], response, reference)
                leaves = resident_bytes() > start["recycle_bytes"]
                _send_message(connection, ["done", item, asdict(verdict), refused, leaves])
                if leaves:
                    return
    except (EOFError, ConnectionError):
        return  # the parent closed the socket or is gone


def score_one(scorer: Scorer, response: str, reference: Any) -> tuple[Verdict, bool]:
    """The scorer's verdict, and whether it refused to give one. Whatever it raises becomes the outcome "error"."""
    try:
        return scorer.score(response, reference), False
    except RewardError as error:
        return Verdict(None, "error", str(error)[:_DETAIL_CHARACTERS]), True
    except BaseException as error:  # noqa: BLE001 - also SystemExit: a library must not end the worker quietly
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Verdict(None, "error", f"the scorer {scorer.name} failed: {reason}"[:_DETAIL_CHARACTERS]), False


def limit_memory(limit_bytes: int) -> None:
    """Let this process and its children map `limit_bytes` each. Beyond that Python raises MemoryError, which becomes an "error"."""
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = limit_bytes if hard == resource.RLIM_INFINITY else min(limit_bytes, hard)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))


def resident_bytes() -> int:
    """Memory this process holds now."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE_BYTES


def _end_with(parent_pid: int) -> None:
    """Let the kernel kill this process when the parent ends, even while a scorer runs in C or if the parent gets SIGKILL."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:  # it ended before the call
        os._exit(1)


def _send_message(connection: Connection, message: list[Any]) -> None:
    connection.send_bytes(json.dumps(message).encode())


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]))
