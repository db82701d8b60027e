"""The cache of judges' answers, which several runs may share."""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from pathlib import Path
from typing import Any

from megatron_r1.errors import RewardError

_WAIT_SECONDS = 30.0  # for another process to finish writing


class JudgeCache:
    """Maps a request to the judge's output, in one SQLite file. Entries are whole or absent; processes of one machine may share it.

    Raises:
        RewardError: the file cannot be used.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._database = sqlite3.connect(path, timeout=_WAIT_SECONDS, check_same_thread=False, isolation_level=None)
            self._database.execute("CREATE TABLE IF NOT EXISTS outputs (request TEXT PRIMARY KEY, output TEXT NOT NULL)")
        except (OSError, sqlite3.Error) as error:
            raise self._unusable(error) from error

    def get(self, request: dict[str, Any]) -> str | None:
        """The output that is kept for this request, or None."""
        row = self._execute("SELECT output FROM outputs WHERE request = ?", (cache_key(request),))
        return row[0] if row else None

    def put(self, request: dict[str, Any], output: str) -> None:
        """Keep an output. If there is one already, that one stays."""
        self._execute("INSERT OR IGNORE INTO outputs VALUES (?, ?)", (cache_key(request), output))

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def _execute(self, statement: str, values: tuple[str, ...]) -> tuple[str] | None:
        with self._lock:
            try:
                return self._database.execute(statement, values).fetchone()
            except sqlite3.Error as error:
                raise self._unusable(error) from error

    def _unusable(self, error: Exception) -> RewardError:
        return RewardError(f"the judge's cache {self._path} cannot be used ({error}): remove it, or set another reward.judge.cache")


def cache_key(request: dict[str, Any]) -> str:
    """A digest of everything that the output depends on: model, messages and sampling."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
