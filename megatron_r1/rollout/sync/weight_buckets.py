"""How large the buckets of an update are."""

from __future__ import annotations

SMALLEST_BUCKET, LARGEST_BUCKET = 32 << 20, 1 << 30
_BUCKETS = 1024  # of an update, where the two bounds allow it


def bucket_bytes(setting_mb: int | None, weight_bytes: int) -> int:
    """Size of a bucket: `rollout.bucket_mb`, or a 1,024th of the weights, between 32 MiB and 1 GiB.

    A call has a cost of its own, some 10 ms over many workers; with 1,342 GB, 20,000 buckets of 64 MiB would cost 200 s, 1,250 of 1
    GiB cost 13 s. And a call must end within `rollout.stall_seconds`: 1 GiB takes a second at 1 GB/s.
    """
    if setting_mb is not None:
        return setting_mb << 20
    return min(LARGEST_BUCKET, max(SMALLEST_BUCKET, weight_bytes // _BUCKETS))
