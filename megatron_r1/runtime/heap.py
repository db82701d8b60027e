"""How the C library's heap treats memory that is freed."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)

KEPT_BYTES = 1 << 30  #: of free memory at the heap's end that a process keeps, at most
LARGEST_ON_HEAP = 32 << 20  #: bytes, the most that glibc allows; a larger block comes from the system unless the heap has room


def keep_freed_memory() -> bool:
    """Let this process keep memory that a training step frees, for the next one; whether the C library can.

    By default glibc gives the end of the heap back whenever more than some megabytes of it are free, and every page that comes
    again is an interrupt and has to be cleared: with a small model a tenth of a step's processor time.
    """
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
    if set_option is None:
        return False
    return bool(set_option(_MMAP_THRESHOLD, LARGEST_ON_HEAP) and set_option(_TRIM_THRESHOLD, KEPT_BYTES))
