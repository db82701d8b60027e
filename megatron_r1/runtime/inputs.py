"""The data and models that a run is made from, known by their content: they may move, and may not change.

`inputs.json` in the run folder has, for each setting that names an input, its path and every file's size, times and checksum. A
file whose size and times are as noted is not read again, so that a start costs one look at each file. What is read of a new input
or of a copy has a limit, see `bytes_to_read`, and the ranks share it. A checkpoint is known by the checksum that completes it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.errors import CheckpointError, DataError
from megatron_r1.runtime.checkpoints import COMPLETE, complete_checkpoints
from megatron_r1.runtime.distributed import gather_objects, kept_on_rank_zero, on_rank_zero, rank, world_size
from megatron_r1.runtime.files import TEMPORARY, file_checksum, new_checksum, telling_times, write_atomically

NOTES = "inputs.json"  #: in the run folder
WHOLE_BYTES = 1 << 30  #: an input of up to so many bytes is read whole
BLOCKS, BLOCK_BYTES = 16, 1 << 16  #: what is read of each file of a larger one
_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".model", ".tiktoken", ".json", ".jsonl", ".gz", ".zst", ".parquet", ".arrow", ".csv",
     ".tsv", ".txt", ".jinja"}
)  # fmt: skip
_UNREADABLE = "cannot be read"
_NO_CONTENT = frozenset({"artifact.json"})  # says where a model was made


class _Look(NamedTuple):
    """A file from outside. Nanoseconds; `changed` is when its entry changed, which nothing but a clock can set back."""

    size: int
    modified: int
    changed: int


class _Task(NamedTuple):
    """A file to read."""

    key: str  #: of the setting; with a minus before it, of the input that the run began with
    name: str  #: path below the input's, "" for the input itself
    path: str
    is_whole: bool


class _Comparison:
    """What rank 0 knows of all inputs."""

    def __init__(self, folder: Path, paths: Mapping[str, str], before: Mapping[str, str] | None) -> None:
        self._folder, self._paths, self._before = folder, paths, before
        self._notes = _read_notes(folder / NOTES) if before is not None else {}
        self._looks: dict[str, dict[str, _Look]] = {}

    def tasks(self) -> list[_Task]:
        """The files that must be read. Raises DataError if sizes or names differ already."""
        tasks: list[_Task] = []
        for key, path in self._paths.items():
            noted = self._notes.get(key)
            found = self._looks[key] = _look_at(Path(path), list(noted["files"]) if noted else [])
            if not found:
                continue  # not there: the stage that reads it says so
            if self._before is not None and noted is None and self._before.get(key, path) != path:
                old = _look_at(Path(self._before[key]), [])
                if not old:
                    raise CheckpointError(
                        f"{key}: this run was begun before contents were noted, so {path} cannot be compared: put it at "
                        f"{self._before[key]}, where a link will do"
                    )
                noted = self._notes[key] = {"path": "", "files": {name: [*look, ""] for name, look in old.items()}}
                tasks += _read_all(f"-{key}", self._before[key], old)
            if noted is None:
                tasks += _read_all(key, path, found)
                continue
            if path == noted["path"] and _is_of_checkpoint(noted["files"]) and found.keys() != noted["files"].keys():
                del self._looks[key]  # a run that has gone on since, and keeps the checkpoint no more
                continue
            _compare_names(key, path, noted["files"], found)
            unread = {n: look for n, look in found.items() if path != noted["path"] or list(look) != noted["files"][n][:3]}
            tasks += [task for task in _read_all(key, path, found) if task.name in unread]
        return tasks

    def settle(self, checksums: Mapping[tuple[str, str], str], note: bool) -> None:
        """Compare the content of what was read, and note all inputs. Raises DataError, or OSError if they cannot be noted."""
        for key, found in self._looks.items():
            if not found:
                continue
            noted = self._notes.get(key, {"files": {}})["files"]
            files: dict[str, list[Any]] = {}
            for name, look in found.items():
                known = checksums.get((f"-{key}", name)) or (noted[name][3] if name in noted else None)
                checksum = checksums.get((key, name), known)
                if checksum is not None and checksum.startswith(_UNREADABLE):
                    raise DataError(_say(key, _place(self._paths[key], name), checksum))
                if known is not None and checksum != known:
                    raise DataError(_say(key, _place(self._paths[key], name), "has other content than when this run began"))
                files[name] = [look.size, *telling_times(look.modified, look.changed), checksum]
            self._notes[key] = {"path": self._paths[key], "files": files}
        if note:
            write_atomically(self._folder / NOTES, json.dumps(self._notes, indent=1, ensure_ascii=False) + "\n")


def bytes_to_read(sizes: Sequence[int]) -> int:
    """Bytes that are read of an input whose files have these sizes: all of a small one, some blocks of each file of a large one."""
    if sum(sizes) <= WHOLE_BYTES:
        return sum(sizes)
    return sum(min(size, BLOCKS * BLOCK_BYTES) for size in sizes)


def compare_inputs(folder: Path, paths: Mapping[str, str], before: Mapping[str, str] | None, *, note: bool = True) -> None:
    """Compare the inputs of a run with those it began with, and note them. All ranks call this.

    Args:
        folder: of the run.
        paths: setting -> path. One that is not there is left to the stage that reads it.
        before: the paths of the last start; None if the run begins now.
        note: False leaves the folder as it is.

    Raises:
        DataError: an input has other content; the file is named.
        CheckpointError: `inputs.json` is damaged, or the run is too old to know the content of an input that has moved.
    """
    comparison = kept_on_rank_zero(lambda: _Comparison(folder, paths, before))
    tasks = on_rank_zero(lambda: comparison.tasks() if comparison is not None else [])
    read = [((task.key, task.name), _checksum(task)) for task in tasks[rank() :: world_size()]]
    checksums = dict(pair for of_rank in gather_objects(read) for pair in of_rank)
    on_rank_zero(lambda: comparison.settle(checksums, note) if comparison is not None else None)


def sampled_checksum(path: Path) -> str:
    """Checksum of a file's size and of blocks at even distances, the first and the last included. Raises OSError."""
    total, size = new_checksum(), path.stat().st_size
    total.update(f"{size}\n".encode())
    with path.open("rb") as file:
        for block in range(BLOCKS):
            file.seek(max(0, size - BLOCK_BYTES) * block // (BLOCKS - 1))
            total.update(file.read(BLOCK_BYTES))
    return total.hexdigest()


def _read_notes(path: Path) -> dict[str, Any]:
    try:
        notes = json.loads(path.read_text(encoding="utf-8"))
        return {
            key: {"path": str(noted["path"]), "files": {name: [*map(int, f[:3]), str(f[3])] for name, f in noted["files"].items()}}
            for key, noted in notes.items()
        }
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        raise CheckpointError(f"{path} is damaged: remove it to note the inputs again, or choose another run_dir") from None


def _look_at(path: Path, known: Sequence[str]) -> dict[str, _Look]:
    """Every file of an input; none if it is not there. Args: `known`: the names that were noted."""
    if path.is_file():
        return {"": _look(path)}
    if not path.is_dir():
        return {}
    if _is_of_checkpoint(known) and (path / known[0]).is_file():
        return {known[0]: _look(path / known[0])}
    runs = [*complete_checkpoints(path / "checkpoints"), *complete_checkpoints(path)]
    complete = (runs[-1] if runs else path) / COMPLETE
    if complete.is_file():
        return {str(complete.relative_to(path)): _look(complete)}
    below = ((file, file.relative_to(path)) for file in sorted(path.rglob("*")))
    return {
        str(name): _look(file)
        for file, name in below
        if file.suffix in _SUFFIXES
        and file.name not in _NO_CONTENT
        and TEMPORARY not in file.name
        and not any(part.startswith(".") for part in name.parts)
        and file.is_file()
    }


def _look(path: Path) -> _Look:
    stat = path.stat()
    return _Look(stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns)


def _is_of_checkpoint(names: Sequence[str] | Mapping[str, Any]) -> bool:
    return [Path(name).name for name in names] == [COMPLETE]


def _read_all(key: str, path: str, files: Mapping[str, _Look]) -> list[_Task]:
    is_whole = sum(look.size for look in files.values()) <= WHOLE_BYTES
    return [_Task(key, name, str(_place(path, name)), is_whole) for name in files]


def _compare_names(key: str, path: str, noted: Mapping[str, Sequence[Any]], found: Mapping[str, _Look]) -> None:
    for name in sorted(noted.keys() | found.keys()):
        place = _place(path, name)
        if name not in found:
            raise DataError(_say(key, place, "is missing"))
        if name not in noted:
            raise DataError(_say(key, place, "was not there when this run began"))
        if found[name].size != noted[name][0]:
            was = f"has {found[name].size} bytes, {noted[name][0]} when this run began: its content is another"
            raise DataError(_say(key, place, was))


def _say(key: str, place: Path, what: str) -> str:
    return f"{key}: {place} {what}; restore it, or choose another run_dir"


def _place(path: str, name: str) -> Path:
    return Path(path, name) if name else Path(path)


def _checksum(task: _Task) -> str:
    """A file that cannot be read has a checksum of its own: a rank that raised alone would leave the others waiting."""
    try:
        return file_checksum(Path(task.path)) if task.is_whole else sampled_checksum(Path(task.path))
    except OSError as error:
        return f"{_UNREADABLE} ({error.strerror})"
