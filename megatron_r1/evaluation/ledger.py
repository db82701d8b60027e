"""A file that grows line by line and survives a kill: what is in it is whole, and nothing is in it twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.runtime.files import write_atomically

Key = tuple[str, int]  #: problem and sample


class Ledger:
    """JSON lines with `problem` and `sample`, beside a file with the settings under which they were made. Use it as a context manager.

    A line is written before `append` returns; half a line, which a killed process may leave, is cut off when the file is opened.
    One process at a time may have it open: the caller locks the folder.

    Args:
        path: of the lines; made where it is not there.
        settings: what the lines depend on; must survive JSON. None: those that the file was begun with.
        replace: begin anew where the lines were made under other settings.

    Raises:
        ConfigError: the lines were made under other settings, or none are given and there are none.
        DataError: a malformed line, a line that is there twice, a file that cannot be read or written.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any] | None, replace: bool = False) -> None:
        self.path = path
        self.lines: dict[Key, dict[str, Any]] = {}
        beside = path.with_suffix(".settings.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.settings = _settle(path, beside, settings, replace)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            self._read()
        except OSError as error:
            raise DataError(f"{path}: cannot be read or written ({error.strerror})") from error

    def append(self, lines: Iterable[Mapping[str, Any]]) -> None:
        """Add lines; those that are there already stay as they are."""
        new = {(line["problem"], line["sample"]): dict(line) for line in lines}
        new = {key: line for key, line in new.items() if key not in self.lines}
        left = memoryview(
            "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new.values()).encode(errors="backslashreplace")
        )
        try:
            while left:
                left = left[os.write(self._file, left) :]
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); the same command goes on from there") from error
        self.lines |= new

    def close(self) -> None:
        """Bring everything to the disk."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._file, whole)
        for number, raw in enumerate(content[:whole].split(b"\n")[:-1], start=1):
            where = f"{self.path}:{number}"
            try:
                line = json.loads(raw)
                key = (str(line["problem"]), int(line["sample"]))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise DataError(f"{where}: not a line of this file ({error}); restore it, or delete the line") from error
            if key in self.lines:
                raise DataError(f"{where}: sample {key[1]} of {key[0]!r} is there twice; delete one of the lines")
            self.lines[key] = line


def _settle(path: Path, beside: Path, settings: Mapping[str, Any] | None, replace: bool) -> dict[str, Any]:
    """The settings of the file. They are written before its first line."""
    known = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else None
    if settings is None:
        if known is None:
            raise ConfigError(f"{path}: there are no responses to score; run the same command without --rescore first")
        return known
    asked = json.loads(json.dumps(settings))
    if known != asked:
        if known is not None and not replace and path.is_file() and path.stat().st_size:
            name = next(name for name in asked if known.get(name) != asked[name])
            raise ConfigError(
                f"{path} was begun with {name}={known.get(name)}, now it is {asked[name]}: restore it, or choose another run_dir"
            )
        path.unlink(missing_ok=True)
        write_atomically(beside, json.dumps(asked, indent=1, ensure_ascii=False) + "\n")
    return asked
