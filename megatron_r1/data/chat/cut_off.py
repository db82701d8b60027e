"""A limit for work that somebody else wrote: the rendering of a chat template."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


class TookTooLong(Exception):
    """The block used up its time."""


@contextmanager
def cut_off(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` in the block once this process has computed for so long in it. A timer costs microseconds.

    Only a main thread is interrupted, as Python's signals are; templates are rendered there, also in worker processes.

    Args:
        seconds: of processor time, so that other load of the machine does not count.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: object) -> None:
        raise TookTooLong(f"it computes for more than {seconds:.0f} s")

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
