"""Signals that ask a run to save and leave.

SIGUSR1 is what Slurm sends ahead of a time limit (`--signal=B:USR1@600`), SIGTERM what it sends at a preemption. Both only set a
flag here: the ranks agree on it between two steps (`Run.checkpoint_due`), save, and leave with exit code 75 (`StopRequested`). The
batch script then requeues the job (docs/cluster.md). SIGUSR2 makes the process write its stacks.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)
_asked: str | None = None
_previous: dict[int, Any] = {}  # signal -> its handler before `listen`
_listeners = 0


def listen(stacks: TextIO | None = None) -> None:
    """From now on a signal asks this process to stop. Each call needs its own `unlisten`.

    Args:
        stacks: where SIGUSR2 writes the stacks of all threads; default: stderr.
    """
    global _listeners
    _listeners += 1
    if threading.current_thread() is not threading.main_thread():
        return  # Python handles signals in the main thread alone
    if not _previous:
        for number in _SIGNALS:
            _previous[number] = signal.signal(number, _note)
    faulthandler.register(signal.SIGUSR2, file=stacks or sys.__stderr__ or sys.stderr, all_threads=True)


def unlisten() -> None:
    """Put back the signal handlers of before the first `listen`."""
    global _listeners
    _listeners = max(0, _listeners - 1)
    if _listeners or threading.current_thread() is not threading.main_thread():
        return
    faulthandler.unregister(signal.SIGUSR2)
    for number, handler in _previous.items():
        signal.signal(number, handler)
    _previous.clear()


def leave_to_rank() -> None:
    """Ignore the stop signals in a process that a rank has started; SIGUSR2 still writes its stacks.

    Slurm signals every process of a step. The rank alone acts on it, for itself and for its child processes.
    """
    for number in _SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, file=sys.__stderr__ or sys.stderr, all_threads=True)


def stop_asked() -> str | None:
    """The signal that asked this process to stop; None if there was none."""
    return _asked


def forget() -> str:
    """Clear the request to stop, which has been met, and return the signal's name, if this process got one."""
    global _asked
    asked, _asked = _asked, None
    return asked or "a signal to another rank"


@contextmanager
def ctrl_c_noted() -> Iterator[list[float]]:
    """In this block SIGINT raises nothing: `time.monotonic` of each one is put into the list. In the main thread only."""
    pressed: list[float] = []
    if threading.current_thread() is not threading.main_thread():
        yield pressed
        return
    before = signal.signal(signal.SIGINT, lambda number, frame: pressed.append(time.monotonic()))
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _note(number: int, frame: FrameType | None) -> None:
    global _asked
    _asked = signal.Signals(number).name
