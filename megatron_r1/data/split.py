"""The split into training and evaluation by a hash of each problem."""

from __future__ import annotations

import zlib

from megatron_r1.errors import DataError

MOST_DRAWS = 200_000  #: after so many draws that all fell into the other part, a part of a generated world counts as empty
_BUCKETS = 10_000


def is_heldout(key: str, fraction: float) -> bool:
    """Whether the problem with this key is held out, by a hash: the same in every run, process and machine.

    Args:
        key: what makes two problems the same problem.
        fraction: share of all keys that is held out, in steps of 0.0001.
    """
    return zlib.crc32(key.encode()) % _BUCKETS < round(fraction * _BUCKETS)


def empty_part(heldout: bool, fraction: float) -> DataError:
    """The error for a part of a generated world in which no problem is."""
    what = "to hold out" if heldout else "to train on"
    return DataError(f"data.heldout_fraction={fraction} leaves no generated problem {what}: choose another share")
