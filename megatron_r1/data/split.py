"""The split into training and evaluation by a hash of each problem."""

from __future__ import annotations

import zlib

_BUCKETS = 10_000


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the problem with this key is held out, by a hash: the same in every run, process and machine.

    Args:
        key: what makes two problems the same problem.
        fraction: share of all keys that is held out, in steps of 0.0001.
    """
    return zlib.crc32(key.encode()) % _BUCKETS < round(fraction * _BUCKETS)
