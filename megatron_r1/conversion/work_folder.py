"""The folder of a conversion on its way: resumable while it has its temporary name, complete when it has its own."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_r1.errors import CheckpointError, ConversionError
from megatron_r1.runtime.distributed import on_rank_zero
from megatron_r1.runtime.files import TEMPORARY, write_atomically

_IDENTITY = "conversion.json"
_MARGIN = 64 << 20  # bytes for headers, metadata and the file system's own


class WorkFolder:
    """Where the parts of a conversion are written, and the notes of which are done. All ranks make it.

    The parts are in `.tmp-NAME`, the notes beside it in `.tmp-NAME.notes`, so that the finished folder holds none.

    Args:
        out: the folder to make.
        identity: what is converted and how; a remainder of the same conversion is continued. Must survive JSON.
        is_complete: whether a folder is whole, not one that was about to be.

    Raises:
        ConversionError: `out` is there, or the remainder of another conversion.
    """

    def __init__(self, out: Path, identity: dict[str, Any], is_complete: Callable[[Path], bool]) -> None:
        self.out = out
        self.folder = out.with_name(f"{TEMPORARY}{out.name}")
        self._notes = out.with_name(f"{TEMPORARY}{out.name}.notes")
        with naming_problems(out):
            on_rank_zero(lambda: self._prepare(identity, is_complete))

    def note(self, part: str) -> dict[str, Any] | None:
        """What was noted of a part; None if the part is still to be done."""
        path = self._notes / f"{part}.json"
        return json.loads(path.read_text()) if path.is_file() else None

    def add_note(self, part: str, note: dict[str, Any]) -> None:
        """Note that a part is written and on disk."""
        write_atomically(self._notes / f"{part}.json", json.dumps(note))

    def require_space(self, needed: int) -> None:
        """Raises ConversionError if the disk has no room for `needed` more bytes. Rank 0 only."""
        free = shutil.disk_usage(self.folder).free
        if needed + _MARGIN > free:
            raise ConversionError(
                f"{self.out} needs {needed / 1e9:.2f} GB more on a disk that has {free / 1e9:.2f} GB free: make room or choose "
                "another --out"
            )

    def finish(self, rename: Callable[[Path, Path], object] = Path.rename) -> None:
        """Give the folder its name and drop the notes. Rank 0 only.

        Args:
            rename: of (folder, final); seals it on the way.
        """
        rename(self.folder, self.out)
        shutil.rmtree(self._notes)

    def _prepare(self, identity: dict[str, Any], is_complete: Callable[[Path], bool]) -> None:
        path = self._notes / _IDENTITY
        known = json.loads(path.read_text()) if path.is_file() else None
        if self.out.exists():
            if known != identity or self.folder.exists() or is_complete(self.out):
                raise ConversionError(f"{self.out} is there already: remove it, or choose another --out")
            self.out.rename(self.folder)  # stopped between its renaming and its last file
        if known is None and (self.folder.exists() or self._notes.exists()):
            raise ConversionError(f"{self.folder} is in the way: remove it and {self._notes.name}")
        if known is not None and known != identity:
            changed = sorted(key for key in known.keys() | identity.keys() if known.get(key) != identity.get(key))
            raise ConversionError(
                f"{self.folder} is the remainder of another conversion ({', '.join(changed)} differ): remove it and "
                f"{self._notes.name}, or choose another --out"
            )
        self.folder.mkdir(parents=True, exist_ok=True)
        self._notes.mkdir(exist_ok=True)
        write_atomically(path, json.dumps(identity))


@contextmanager
def naming_problems(out: Path) -> Iterator[None]:
    """Tell what the operating system refuses, a full disk above all, as one line about `out`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{out} cannot be written: {error.strerror or error}; the same command goes on from what is done"
        ) from error
