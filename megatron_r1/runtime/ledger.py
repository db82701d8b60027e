"""Append-only files of JSON lines that a kill cannot damage: what was appended stays, and no key stands there twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.file_locks import lock_file
from megatron_r1.runtime.files import write_atomically, write_buffer


class Ledger:
    """Records with a key, on disk and in memory. One process at a time holds a ledger open. Use it as a context manager.

    Opening the file removes a last line that a kill has cut: the `append` of its record had not returned.

    Args:
        path: of the file; it is made if it is missing.
        key: the fields that name a record, text or whole numbers. The key of one field is its value, that of several their tuple.

    Raises:
        DataError: the file cannot be written, another process writes it, or a line is damaged or stands there twice.
        ConfigError: its file system has no locks.
    """

    def __init__(self, path: Path, key: Sequence[str] = ("id",)) -> None:
        self.path, self._key = path, tuple(key)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b", buffering=0)
        except OSError as error:
            raise DataError(f"{path}: cannot be written ({error.strerror})") from None
        try:
            lock_file(self._file, str(path))
            self.records = self._read()  #: key -> record, in the order in which they were appended
            sync_folder(path.parent)
        except BlockingIOError:
            self._file.close()
            raise DataError(f"{path} is being written by another process: wait for it, or choose another folder") from None
        except OSError as error:
            self._file.close()
            raise DataError(f"{path}: cannot be read or written ({error.strerror})") from None
        except BaseException:
            self._file.close()
            raise

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Append the records whose key is not there yet; when this returns, they are on the disk.

        Raises:
            DataError: the file cannot be written.
        """
        new = {self._key_of(record): dict(record) for record in records}
        new = {key: record for key, record in new.items() if key not in self.records}
        if not new:
            return
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new.values())
        # What a tokenizer decodes may hold half a surrogate pair: it is written as an escape, which reads back the same.
        data = lines.encode("utf-8", "backslashreplace")
        try:
            write_buffer(self._file.fileno(), memoryview(data))
            os.fsync(self._file.fileno())
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); the same command goes on from there") from None
        self.records |= new

    def close(self) -> None:
        """Close the file and let another process have it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _key_of(self, record: Mapping[str, Any]) -> Any:
        """Raises KeyError or TypeError if the record has no such key."""
        values = tuple(record[name] for name in self._key)
        if not all(isinstance(value, (str, int)) for value in values):
            raise TypeError(f"{' or '.join(self._key)} is neither text nor a whole number")
        return values if len(values) > 1 else values[0]

    def _read(self) -> dict[Any, dict[str, Any]]:
        self._file.seek(0)
        lines = self._file.read().split(b"\n")
        records: dict[Any, dict[str, Any]] = {}
        kept = 0  # bytes
        for number, line in enumerate(lines, start=1):
            where = f"{self.path}:{number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
                if any(lines[number:]):
                    reason = str(error).splitlines()[0]
                    raise DataError(f"{where}: bad JSON ({reason}); remove the line, what it held is made again") from None
                break
            if number == len(lines):
                break  # whole, but its line break is missing: a kill came before the append had returned
            try:
                key = self._key_of(record)
            except (KeyError, TypeError) as error:
                raise DataError(f"{where}: not a line of this file ({error}); restore it, or remove the line") from None
            if key in records:
                named = ", ".join(f"{name} {record[name]!r}" for name in self._key)
                raise DataError(f"{where}: the {named} stands there twice; remove one of the lines")
            records[key] = record
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
    for key, before, now in changed_settings(known, json.loads(json.dumps(settings))):
        raise ConfigError(f"{folder} was begun with {key}={before!r:.80}, now it is {now!r:.80}: keep it, or choose another folder")


def changed_settings(known: Mapping[str, Any], settings: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """(dotted name, known value, value) of every setting that is new or changed; the known value of a new one is None."""
    before = dict(_dotted_settings(known))
    for key, value in _dotted_settings(settings):
        if key not in before or before[key] != value:
            yield key, before.get(key), value


def _dotted_settings(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, dict):
            yield from _dotted_settings(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def sync_folder(folder: Path) -> None:
    """Let a file that was made or renamed in a folder be there after a power failure."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
