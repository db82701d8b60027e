"""Signs of life: how the ranks of a job notice that one of them hangs, and all leave with their stacks written.

    run_dir/health/
        rank_00000.json          this rank's latest sign of life: where it runs, what it does, since when
        abort.json               which rank was lost, and why all leave
        stacks_rank_00000.txt    the stacks of all its threads when it left

A thread of each rank writes the rank's sign and watches that of the next rank, so whichever ranks hang, a living rank watches one
of them. Signs are files on the shared file system and not messages: messages go through rank 0, which may hang itself, and
`megatron-r1 status` reads the files without being part of the job.

There are three ways to hang. A process that stands still (stopped, or waiting for a dead disk) gives no sign. A process whose main
thread waits for ever gives signs but begins nothing new (`stall_seconds`); one that waits for an engine that samples for hours is
told so by the engine's signs. A process that holds Python's lock cannot run the thread: a timer in C, which every sign winds up
again, then writes the stacks and ends the process.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NoReturn, TextIO

from megatron_r1.config.runtime import HeartbeatConfig
from megatron_r1.errors import StopRequested
from megatron_r1.runtime.files import write_atomically
from megatron_r1.runtime.job import record_outcome, write_once
from megatron_r1.runtime.launch import node_name
from megatron_r1.runtime.waiting import hear_signs, stop_hearing

FOLDER, ABORT = "health", "abort.json"
ENDED = "ended"  #: the activity of a rank that has closed its run


@dataclass
class Sign:
    """One sign of life."""

    rank: int
    world_size: int
    host: str  #: as the operating system calls it
    node: str  #: as the scheduler calls it
    pid: int
    beat: int = 0  #: counts the signs
    time: float = 0.0  #: seconds since 1970, by this rank's clock
    interval_seconds: float = 0.0
    activity: str = "starting"  #: what the main thread began last
    since: float = 0.0  #: when that was
    step: int = 0  #: the step that it is in
    total: int = 0  #: steps of the run
    seconds: dict[str, float] = field(default_factory=dict)  #: what the last step took here, by timer


def read_sign(path: Path) -> Sign | None:
    """A rank's latest sign of life; None if there is none, or if it cannot be read."""
    try:
        return Sign(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def sign_path(folder: Path, rank: int) -> Path:
    """Where a rank writes its signs."""
    return folder / f"rank_{rank:05d}.json"


def clear_signs(folder: Path) -> None:
    """Remove the signs of an earlier job; its stacks stay for who looks for the reason. Rank 0 only, before any rank begins."""
    folder.mkdir(exist_ok=True)
    for path in [*folder.glob("rank_*"), folder / ABORT]:
        path.unlink(missing_ok=True)


class Heartbeat:
    """This rank's signs of life, from `start` to `close`.

    Args:
        folder: of the signs, in the run folder.
    """

    def __init__(self, folder: Path, config: HeartbeatConfig, rank: int, world_size: int) -> None:
        self._folder, self._config = folder, config
        now = time.time()
        self._sign = Sign(rank, world_size, socket.gethostname(), node_name(), os.getpid(), since=now)
        self._sign.interval_seconds = config.interval_seconds
        self._began = time.monotonic()  # the latest activity
        self._neighbour = (rank + 1) % world_size
        self._seen: tuple[int, int] | None = None  # pid and number of the neighbour's latest sign
        self._seen_at = time.monotonic()
        self._end = threading.Event()
        self._stacks: TextIO | None = None
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def start(self) -> None:
        """Begin to give signs and to watch."""
        self._stacks = self._stacks_path().open("a", encoding="utf-8")
        self._give_sign()
        hear_signs(self.go_on)
        self._thread.start()

    def begin(self, activity: str, step: int | None = None, total: int | None = None) -> None:
        """The main thread begins something: proof that it does not hang."""
        self._began = time.monotonic()
        self._sign.activity, self._sign.since = activity, time.time()
        if step is not None:
            self._sign.step, self._sign.total = step, total or 0

    def go_on(self) -> None:
        """What the main thread began goes on: an engine that it waits for, here or on another rank, gives signs of life."""
        self._began = time.monotonic()

    def end_step(self, seconds: Mapping[str, float]) -> None:
        """Show what the last step took."""
        self._sign.seconds = {name.removeprefix("seconds/"): round(value, 4) for name, value in seconds.items()}

    def close(self) -> None:
        """Give the last sign, after which the watching rank waits for no more."""
        if self._end.is_set():
            return
        self._end.set()
        stop_hearing(self.go_on)
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        self.begin(ENDED)
        with suppress(OSError):  # the folder is gone or full; whoever needs it reports that
            self._give_sign(last=True)
        if self._stacks is not None:
            self._stacks.close()
            with suppress(OSError):
                if self._stacks_path().stat().st_size == 0:
                    self._stacks_path().unlink()

    def _run(self) -> None:
        while not self._end.wait(self._config.interval_seconds):
            try:
                self._give_sign()
                self._look()
            except OSError as error:  # a full disk stops the signs, not the run; the peers may still see an old one
                print(f"heartbeat: {error}", file=sys.stderr, flush=True)

    def _give_sign(self, last: bool = False) -> None:
        if not last:  # for the case that this thread does not run again in time
            assert self._stacks is not None, "`start` opens it"
            faulthandler.dump_traceback_later(2 * self._config.lost_seconds, exit=True, file=self._stacks)
        self._sign.beat += 1
        self._sign.time = time.time()
        write_atomically(sign_path(self._folder, self._sign.rank), json.dumps(asdict(self._sign)), durable=False)

    def _look(self) -> None:
        """Leave if a rank asks for it, or if the neighbour or this rank itself hangs."""
        if (self._folder / ABORT).exists():
            self._leave()
        now = time.monotonic()
        if now - self._began > self._config.stall_seconds:
            self._abort(self._sign, f"has done nothing new for {now - self._began:.0f} s")
        if self._neighbour == self._sign.rank:
            return
        sign = read_sign(sign_path(self._folder, self._neighbour))
        if sign is not None and ((sign.pid, sign.beat) != self._seen or sign.activity == ENDED):
            self._seen, self._seen_at = (sign.pid, sign.beat), now
        elif now - self._seen_at > self._config.lost_seconds:
            self._abort(
                sign or Sign(self._neighbour, self._sign.world_size, "", "", 0), f"gave no sign for {now - self._seen_at:.0f} s"
            )

    def _abort(self, lost: Sign, what: str) -> NoReturn:
        where = f"node {lost.node}, process {lost.pid}" if lost.pid else "never seen"
        why = f"rank {lost.rank} ({where}) {what} in {lost.activity!r}, step {lost.step}"
        write_once(self._folder / ABORT, json.dumps({"why": why, "found_by": self._sign.rank} | asdict(lost)))
        self._leave()

    def _leave(self) -> NoReturn:
        """Write the stacks, wake a stopped peer on this machine so that it writes its own, and end the process.

        An exception would not do: the main thread is in a collective that never ends.
        """
        abort = json.loads((self._folder / ABORT).read_text(encoding="utf-8"))
        why = f"{abort['why']}; stacks of all ranks are in {self._folder}; the same command resumes"
        faulthandler.cancel_dump_traceback_later()
        assert self._stacks is not None, "`start` opens it"
        self._stacks.write(f"rank {self._sign.rank}, process {self._sign.pid}: {why}\n")
        self._stacks.flush()
        faulthandler.dump_traceback(file=self._stacks, all_threads=True)
        self._stacks.flush()
        is_here = abort["host"] == self._sign.host and abort["pid"] not in (0, self._sign.pid)
        if is_here and write_once(self._folder / f"rank_{abort['rank']:05d}.woken", ""):
            with suppress(OSError):  # it is gone
                os.kill(abort["pid"], signal.SIGCONT)  # it then finds `abort.json` as all others do
        record_outcome("stalled", why)
        print(f"megatron-r1: error: {why}", file=sys.stderr, flush=True)
        time.sleep(2 * self._config.interval_seconds)  # the launcher kills all ranks once one leaves: let all write first
        os._exit(StopRequested.exit_code)

    def _stacks_path(self) -> Path:
        return self._folder / f"stacks_rank_{self._sign.rank:05d}.txt"
