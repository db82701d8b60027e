"""What pools of processes need of the machine: semaphores and shared memory, which are files in /dev/shm."""

from __future__ import annotations

import errno
import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.shared_memory import SharedMemory

from megatron_r1.errors import ConfigError

_LIMITS = {
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
    errno.ENOMEM: "free memory",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close files: the machine's limit is reached",
}
_NEEDED = "/dev/shm, which must be mounted, writable and not full"
_ERRORS = (OSError, NotImplementedError, ImportError)  # the latter two: Python has found no semaphores at all


@contextmanager
def starting_processes(what: str, way_on: str = "") -> Iterator[None]:
    """Around the call that makes a pool, and nothing else: an error of the machine there is said in one line.

    Args:
        what: needs the processes: a setting and its value, or a command.
        way_on: how to do without them, if there is a way.

    Raises:
        ConfigError: semaphores or processes cannot be made.
    """
    try:
        yield
    except _ERRORS as error:
        limit = _LIMITS.get(error.errno or 0) if isinstance(error, OSError) else None
        advice = limit or f"their semaphores are files in {_NEEDED}"
        ways = f"{advice}, or {way_on}" if way_on else advice
        raise ConfigError(f"{what} cannot start processes: {_reason(error)}; {ways}") from None


def shared_memory_problem() -> str | None:
    """Why this machine gives no semaphores or shared memory, and what to do; None if it does."""
    try:
        multiprocessing.get_context("spawn").Lock()
        block = SharedMemory(create=True, size=1)
        block.close()
        block.unlink()
    except _ERRORS as error:
        return f"{_reason(error)}; they are files in {_NEEDED}"
    return None


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)
