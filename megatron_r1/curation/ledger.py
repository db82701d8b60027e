"""Append-only files of JSON lines that a kill cannot damage: what was appended stays, and no id stands there twice."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_r1.curation.records import parse_object
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.files import write_atomically


class Ledger:
    """Records with an `id`, on disk and in memory. One process at a time holds a ledger open. Use it as a context manager.

    A last line that a kill has cut is removed when the file is opened: its record was never told to be kept.

    Raises:
        DataError: the file cannot be written, another process writes it, or a line before the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.records = self._read()  #: id -> record, in the order in which they were appended
            sync_folder(path.parent)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path} is being written by another process: wait for it, or choose another folder") from None
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append those whose id is not there yet; when this returns, they are on the disk.

        Raises:
            DataError: the file cannot be written.
        """
        new = {record["id"]: record for record in records if record["id"] not in self.records}
        if not new:
            return
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new.values())
        # What a tokenizer decodes may hold half a surrogate pair: it is written as an escape, which reads back the same.
        data = lines.encode("utf-8", "backslashreplace")
        try:
            while data:
                data = data[self._file.write(data) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from None
        self.records |= new

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> dict[str, dict[str, Any]]:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        records: dict[str, dict[str, Any]] = {}
        kept = 0  # bytes
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            try:
                record = parse_object(line, where)
                if not isinstance(record.get("id"), str):
                    raise DataError(f"{where}: no id")
            except DataError as error:
                if any(lines[number:]):
                    raise DataError(f"{error}; remove the line, what it held is made again") from None
                break
            if number == len(lines):
                break  # whole, but its line break is missing: a kill came before the append had returned
            if record["id"] in records:
                raise DataError(f"{where}: the id {record['id']!r} stands there twice; remove one of the lines")
            records[record["id"]] = record
            kept += len(line) + 1
        self._file.truncate(kept)
        os.fsync(self._file.fileno())
        return records


def settle(folder: Path, settings: Mapping[str, Any]) -> None:
    """Let a folder have these settings for good: its ledgers must not be continued under others.

    Raises:
        ConfigError: it has others already; the message names the first that differs.
        DataError: the file cannot be written.
    """
    path = folder / "settings.json"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
            sync_folder(folder)
        known = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be written ({error.strerror})") from None
    except ValueError:
        raise DataError(f"{path} is damaged: choose another folder") from None
    before = dict(_flatten(known))
    for key, value in _flatten(json.loads(json.dumps(settings))):
        if key not in before or before[key] != value:
            raise ConfigError(
                f"{folder} was begun with {key}={before.get(key)!r:.80}, now it is {value!r:.80}: keep it, or choose another folder"
            )


def _flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def sync_folder(folder: Path) -> None:
    """Let a file that was made or renamed in a folder be there after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
