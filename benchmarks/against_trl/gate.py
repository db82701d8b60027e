"""How a side waits for its turn: it says that it is ready, and goes on when it is told to. Imports the standard library alone."""

from __future__ import annotations

import json
import os
from typing import Any


class Gate:
    """The child's end of two pipes.

    Args:
        commands: file descriptor to read from.
        reports: file descriptor to write to.
    """

    def __init__(self, commands: int, reports: int) -> None:
        for descriptor in (commands, reports):
            os.set_inheritable(descriptor, False)  # a child of the child would keep the pipe open when this side is gone
        self._commands = os.fdopen(commands, encoding="utf-8")
        self._reports = os.fdopen(reports, "w", encoding="utf-8")

    def wait(self, report: dict[str, Any] | None = None) -> str:
        """Report what was done since the last turn, and wait for a command; "end" also where the other end is gone."""
        try:
            self._reports.write(json.dumps(report or {}) + "\n")
            self._reports.flush()
        except BrokenPipeError:
            return "end"
        return self._commands.readline().strip() or "end"
