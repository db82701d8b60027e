"""A limit for work that somebody else wrote: the rendering of a chat template."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from megatron_r1.cpu_limit import cpu_limit


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

    with cpu_limit(seconds, TookTooLong(f"it computes for more than {seconds:.0f} s")):
        yield
