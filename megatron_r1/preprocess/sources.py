"""The files that are preprocessed, and how each is cut into parts.

A part is what stands in `part_bytes` of a source, so parts depend on the input alone and not on who reads them. Where a part begins
can be sought in a plain file of lines (`seekable`); all others are read from their beginning by whoever writes parts of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
_MOST_PARTS = 2048  # of all sources together, and one more for each source


@dataclass(frozen=True)
class Source:
    """A file."""

    path: str
    kind: Kind
    size: int  #: bytes, packed ones if it is packed
    modified: int  #: nanoseconds
    changed: int  #: nanoseconds, of its entry: nothing but a clock can set it back
    checksum: str = ""

    @property
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
    """Bytes of a part: 16 MiB, or as many as leave at most 2,048 parts of all sources and one more of each."""
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
        below = [file for file in sorted(path.rglob("*")) if file.is_file()]
        named = [file for file in below if _kind_of(file) and not file.name.startswith(".")]
        chosen = [file for file in named if file.name not in _BESIDE_NAMES and not file.stem.lower().startswith(_BESIDE_STEMS)]
        if not chosen:
            raise DataError(
                f"{path}: the folder holds no file to read ({', '.join(_KIND_OF)}; but for Parquet also with .gz, .zst)"
            )
        files += chosen
        aside += [file for file in below if file not in set(chosen)]
    known: set[Path] = set()
    for file in files:
        if (place := file.resolve()) in known:
            raise DataError(f"{file}: is named twice; its documents would stand there twice")
        known.add(place)
    return [_look_at_source(file) for file in files], aside


def _look_at_source(path: Path) -> Source:
    if is_piped(path):
        raise DataError(f"{path}: is a pipe, which processes cannot share and no later start can read again; name a file")
    kind = _kind_of(path)
    try:
        stat = path.stat()
        if kind is None:
            raise DataError(f"{path}: expected a folder, or {_FORMS}")
        if not stat.st_size:
            raise DataError(f"{path}: the file is empty")
        if Path(_unpacked_name(path)).suffix == ".json":
            _check_object_lines(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError) as error:
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
