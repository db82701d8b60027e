"""The most memory that tensors took of this process's device in each part of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PeakMemory:
    """Keeps the peak of every part. A part within another one counts for both.

    Args:
        read: bytes at most since it was called before; 0 where nobody counts, as on a CPU.
    """

    def __init__(self, read: Callable[[], int]) -> None:
        self._read = read
        self._open: list[str] = []
        self._peaks: dict[str, int] = {}

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what the block takes for `name`."""
        self._note()
        self._open.append(name)
        try:
            yield
        finally:
            self._note()
            self._open.remove(name)

    def take(self) -> dict[str, int]:
        """`memory/<part>` -> bytes, of the parts since the last call; those of which nothing is known are left out."""
        found, self._peaks = {f"memory/{name}": peak for name, peak in self._peaks.items() if peak}, {}
        return found

    def _note(self) -> None:
        peak = self._read()
        for name in self._open:
            self._peaks[name] = max(self._peaks.get(name, 0), peak)
