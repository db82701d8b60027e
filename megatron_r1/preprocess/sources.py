"""The files that are preprocessed, and how each is cut into parts.

A part is what stands in `part_bytes` of a source, so parts depend on the input alone and not on who reads them. Where a part begins
can be sought in a plain file of lines (`seekable`); all others are read from their beginning by whoever writes parts of them.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from megatron_r1.data.unpacked import PACKED, is_piped, open_unpacked
from megatron_r1.errors import DataError, one_line

Kind = Literal["lines", "text", "csv", "parquet"]

_KIND_OF: dict[str, Kind] = {
    ".jsonl": "lines", ".json": "lines", ".txt": "text", ".md": "text", ".csv": "csv", ".parquet": "parquet"
}  # fmt: skip
_FORMS = f"{', '.join(_KIND_OF)}; but for Parquet also with .gz or .zst"
_SAVED = ("state.json", "dataset_dict.json")  # of datasets' save_to_disk
#: what stands beside data in a folder and is none
_BESIDE_NAMES = {*_SAVED, "dataset_info.json", "dataset_infos.json"}
_BESIDE_STEMS = ("readme", "license", "licence", "notice", "changelog", "citation", "contributing")
_LEAST_PART = 16 << 20  # bytes
_MOST_PARTS = 1 << 16  # of all sources together, and one more for each source


@dataclass(frozen=True)
class Source:
    """A file."""

    path: str
    kind: Kind
    size: int  #: bytes, packed ones if it is packed
    modified: int  #: nanoseconds
    changed: int  #: nanoseconds, of its entry: nothing but a clock can set it back
    checksum: str = ""

    @cached_property
    def seekable(self) -> bool:
        """Whether reading can begin at any line."""
        return self.kind == "lines" and Path(self.path).suffix not in PACKED

    def parts(self, part_bytes: int) -> int | None:
        """Number of its parts; None if only its reader will know."""
        return max(1, -(-self.size // part_bytes)) if self.seekable else None

    @property
    def content(self) -> dict[str, Any]:
        """What a note says of it."""
        return {"path": self.path, "bytes": self.size, "checksum": self.checksum}


def part_size(sources: Sequence[Source]) -> int:
    """Bytes of a part: 16 MiB, or as many as leave at most 65,536 parts of all sources and one more of each.

    A part is what a killed process loses, and its lengths are in memory (4 bytes a sequence). Of 15T tokens, some 60 TB, one has
    1 GB, ten minutes of a process.
    """
    size = _LEAST_PART
    while size * _MOST_PARTS < sum(source.size for source in sources):
        size *= 2
    return size


def find_sources(paths: Sequence[Path]) -> tuple[list[Source], list[Path]]:
    """The files of `paths` in the order of the paths, those of a folder in the order of their names.

    Returns:
        The sources, and the files of folders that are left aside because their names say that they hold no data.

    Raises:
        DataError: a path that is missing, empty, of a form that cannot be read piece by piece, or given twice.
    """
    files: list[Path] = []
    aside: list[Path] = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        if saved := next((name for name in _SAVED if (path / name).is_file()), None):
            raise DataError(f"{path}: was made by datasets' save_to_disk ({saved}); write it with Dataset.to_parquet and name that")
        below = _files_below(path)
        chosen = [file for file in below if _is_data(file)]
        if not chosen:
            raise DataError(
                f"{path}: the folder holds no file to read ({', '.join(_KIND_OF)}; but for Parquet also with .gz, .zst)"
            )
        files += chosen
        taken = set(chosen)
        aside += [file for file in below if file not in taken]
    known: dict[Path, Path] = {}
    for file in files:
        if (other := known.setdefault(file.resolve(), file)) is not file:
            also = "" if str(other) == str(file) else f", also as {other}"
            raise DataError(f"{file}: is named twice{also}; its documents would stand there twice")
    return [_look_at_source(file) for file in files], aside


def _files_below(folder: Path) -> list[Path]:
    """The files of a folder, of those below it and of those that links there lead to, in order; hidden folders stand for theirs.

    Raises:
        DataError: a folder that cannot be read, or one that is below itself: what is in it would be missing, or there twice.
    """
    found: list[Path] = []
    above = {folder: {folder.resolve()}}  # of each folder it and those that it is below
    try:
        for name, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
            here = Path(name)
            inner = [here / inner for inner in folders if not inner.startswith(".")]
            for below in inner:
                if (place := below.resolve()) in above[here]:
                    raise DataError(f"{below}: is a link to a folder above it; remove it, or name the files")
                above[below] = {*above[here], place}
            found += [here / hidden for hidden in folders if hidden.startswith(".")]
            found += [here / file for file in files]
            folders[:] = [below.name for below in inner]
    except OSError as error:
        raise DataError(f"{error.filename}: the folder cannot be read ({error.strerror})") from None
    return sorted(found)


def _raise(error: OSError) -> None:
    raise error


def _is_data(file: Path) -> bool:
    """Whether the name of a file in a folder says that it is read. A broken link or a pipe with such a name is an error later."""
    if file.name.startswith(".") or not _kind_of(file):
        return False
    return file.name not in _BESIDE_NAMES and not file.stem.lower().startswith(_BESIDE_STEMS)


def _look_at_source(path: Path) -> Source:
    if is_piped(path):
        raise DataError(f"{path}: is a pipe, which processes cannot share and no later start can read again; name a file")
    kind = _kind_of(path)
    try:
        stat = path.stat()
        with path.open("rb") as file:  # told now, and not after hours
            file.read(1)
        if kind is None:
            raise DataError(f"{path}: expected a folder, or {_FORMS}")
        if not stat.st_size:
            raise DataError(f"{path}: the file is empty")
        if Path(_unpacked_name(path)).suffix == ".json":
            _check_object_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: {'is a link to nothing' if path.is_symlink() else 'no such file'}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from None
    return Source(str(path), kind, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _kind_of(path: Path) -> Kind | None:
    kind = _KIND_OF.get(Path(_unpacked_name(path)).suffix)
    return None if kind == "parquet" and path.suffix in PACKED else kind


def _unpacked_name(path: Path) -> str:
    return path.stem if path.suffix in PACKED else path.name


def _check_object_lines(path: Path) -> None:
    """A .json file may hold one object a line, or one list, of which no part can be read by itself."""
    with open_unpacked(path) as file:
        line = file.readline(1 << 20)
    try:
        is_object = len(line) >= 1 << 20 or isinstance(json.loads(line.decode("utf-8-sig")), dict)
    except (ValueError, RecursionError):
        is_object = False
    if not is_object:
        raise DataError(f"{path}: its first line is no object: a list has to be read whole; write one object a line, as .jsonl")
