"""Signs of life of an engine that samples: only if it computed something, so that one that goes round in circles gives none."""

from __future__ import annotations

import time
from collections.abc import Callable

_SECONDS_BETWEEN_SIGNS = 1.0


class SignsOfProgress:
    """Signs for as long as a measure changes.

    Args:
        measure: of the work done so far.
        sign: called about once a second, if the measure is another one than at the last sign.
        seconds: between two signs at least.
    """

    def __init__(self, measure: Callable[[], object], sign: Callable[[], None], seconds: float = _SECONDS_BETWEEN_SIGNS) -> None:
        self._measure, self._sign, self._seconds = measure, sign, seconds
        self._seen, self._signed_at = measure(), time.monotonic()

    def look(self) -> None:
        """Call this at every step of the work."""
        if time.monotonic() - self._signed_at > self._seconds and (now := self._measure()) != self._seen:
            self._sign()
            self._seen, self._signed_at = now, time.monotonic()
