"""A scoring worker, seen from the trainer: started, given batches, and killed when it is late."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import ScorerSpec

START_SECONDS = 120.0  #: for importing and building the scorers
_REAP_SECONDS = 5.0


@dataclass(frozen=True)
class WorkerLimits:
    """The memory that a worker may use."""

    memory_bytes: int  #: address space of the worker, and of each of its children
    recycle_bytes: int  #: resident memory above which the worker is replaced after the current response


@dataclass
class PendingResponse:
    """One response on its way to a verdict."""

    id: int
    scorer: str
    response: str
    reference: Any
    verdict: Future[Verdict]
    given: int = 0  #: how often it was handed to a worker


class WorkerProcess:
    """One worker in a session of its own. Start it in the thread that will end it: the worker dies with its parent *thread*.

    Args:
        environment: None: this process's own.
        log: takes the worker's output; None: nobody reads it.
    """

    def __init__(
        self, specs: Mapping[str, ScorerSpec], limits: WorkerLimits, environment: Mapping[str, str] | None, log: Path | None
    ) -> None:
        self.ready = False
        self.clock_runs = False  #: whether the first of `items` has begun
        self.items: deque[PendingResponse] = deque()  #: the batch it works on, the current response first
        self.deadline: float | None = time.monotonic() + START_SECONDS  #: None: the worker has nothing to do
        self._specs = specs
        ours, theirs = socket.socketpair()
        with open(log or os.devnull, "ab") as output, theirs:
            # No preexec_fn and no fork of this process's state: its torch threads may hold any lock.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_r1.rewards.workers.main", str(theirs.fileno()), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=None if environment is None else dict(environment),
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        start = {"scorers": {name: [spec.target, dict(spec.settings)] for name, spec in specs.items()}, **asdict(limits)}
        try:
            self._send(start)
        except ConnectionError:
            pass  # the worker is dead already: whoever waits for its messages sees the end of its socket

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    def give(self, batch: Sequence[PendingResponse]) -> None:
        """Send a batch to a worker that waits for one and therefore reads it at once.

        Raises:
            ConnectionError: the worker is dead.
        """
        self.items.extend(batch)
        for item in batch:
            item.given += 1
        self.deadline = time.monotonic() + START_SECONDS  # until it has read the batch
        self._send([[item.id, item.scorer, item.response, item.reference] for item in batch])

    def start_clock(self) -> None:
        """Start measuring: the first of `items` begins now, or none is left."""
        self.clock_runs = bool(self.items)
        self.deadline = time.monotonic() + self._specs[self.items[0].scorer].time_limit_seconds if self.items else None

    def receive(self) -> list[Any]:
        """The next message. Raises EOFError or ConnectionError if the worker is dead."""
        return json.loads(self.connection.recv_bytes())

    def end(self, by_itself: bool = False) -> str:
        """Kill the worker with its process group, and say how it ended: "SIGKILL", "exit code 1".

        Args:
            by_itself: it has closed its socket, so it is ending; a busy machine may take a moment over that.
        """
        self.connection.close()
        if by_itself:
            self._wait_for_exit()
        try:
            os.killpg(self._process.pid, signal.SIGKILL)  # before `wait`: until then no other process can have its id
        except ProcessLookupError:
            pass
        try:
            code = self._process.wait(_REAP_SECONDS)
        except subprocess.TimeoutExpired:  # stuck in the kernel, e.g. on a dead file system
            return "not ending"
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"

    def _wait_for_exit(self) -> None:
        """Wait until the worker has ended, without reaping it: until then no other process can have its id."""
        deadline = time.monotonic() + _REAP_SECONDS
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return
            time.sleep(0.005)

    def _send(self, message: Any) -> None:
        self.connection.send_bytes(json.dumps(message).encode())
