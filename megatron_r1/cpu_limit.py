"""A limit of processor time for code of somebody else: a library's algebra, a chat template."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def cpu_limit(seconds: float, error: BaseException) -> Iterator[None]:
    """Raise `error` in the block once this process has computed for so long in it. A timer costs microseconds.

    Only in a main thread, the one that Python's signals interrupt. Of processor time, other load of the machine does not count.
    """

    def end(*_: object) -> None:
        raise error

    before = signal.signal(signal.SIGVTALRM, end)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
