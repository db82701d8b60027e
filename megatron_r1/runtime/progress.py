"""Progress of whatever takes longer than a few seconds: a bar on a terminal, a line now and then in a log file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 10.0


class _Bar(tqdm):
    """tqdm reads the wall clock, whose jumps would show as negative times and rates."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._time = time.monotonic
        self.start_t = self.last_print_t = time.monotonic()


class Progress:
    """Counts to `total` on standard error. `initial` units are done already; a disabled one (ranks above 0) is silent.

    With `unit` "B" it counts bytes, and shows them and their rate in large units.
    """

    def __init__(self, total: int, description: str, initial: int = 0, enabled: bool = True, unit: str = "it") -> None:
        self.total = total
        self.description = description
        self.done = initial
        self._initial = initial
        self._enabled = enabled
        self._in_bytes = unit == "B"
        self._started = time.monotonic()
        self._last_line = self._started
        self._shown = ""
        self._bar = None
        if enabled and sys.stderr.isatty():
            scaled = unit == "B"
            self._bar = _Bar(total=total, desc=description, initial=initial, dynamic_ncols=True, unit=unit, unit_scale=scaled)

    def show(self, values: Mapping[str, float]) -> None:
        """Put these values behind the bar, or at the end of the next line."""
        self._shown = ", ".join(f"{name}={value:.4g}" for name, value in values.items())
        if self._bar is not None:
            self._bar.set_postfix_str(self._shown, refresh=False)

    def advance(self, count: int = 1) -> None:
        """`count` more units are done."""
        self.done += count
        if self._bar is not None:
            self._bar.update(count)
        elif self._enabled and (time.monotonic() - self._last_line >= SECONDS_BETWEEN_LINES or self.done == self.total):
            self._last_line = time.monotonic()
            print(self._line(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the terminal on a new line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _line(self) -> str:
        elapsed = time.monotonic() - self._started
        left = elapsed / max(self.done - self._initial, 1) * max(self.total - self.done, 0)
        count = f"{self.done}/{self.total}"
        if self._in_bytes:
            rate = (self.done - self._initial) / max(elapsed, 1e-9)
            done, total, per_second = (tqdm.format_sizeof(value, "B") for value in (self.done, self.total, rate))
            count = f"{done}/{total}, {per_second}/s"
        line = f"{self.description}: {count}, {elapsed:.0f} s, about {left:.0f} s left"
        return f"{line}, {self._shown}" if self._shown else line
