"""Records of tables in any of the usual forms, one at a time, each with the place it stands at.

FILE.jsonl, FILE.jsonl.gz   one object a line, read line by line
FILE.json                   one list of objects
FILE.parquet                read a few rows at a time
FOLDER                      a `datasets` folder made by save_to_disk, or a folder of such files
"""

from __future__ import annotations

import gzip
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_r1.data.records import parse_json, read_records
from megatron_r1.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|valid|validation|dev|test|eval)(?:[^a-z]|$)")
_SAME_SPLIT = {"training": "train", "valid": "validation", "dev": "validation", "eval": "test"}
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_ROWS = 256  # of a parquet file in memory at a time


def stream_records(path: Path, split: str = "train") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every record with where it stands ("file.jsonl:3", "file.json item 3", "file.parquet row 3"), in the order of the files.

    Args:
        path: see above.
        split: of a folder that holds several.

    Raises:
        DataError: one line with file and line of what is missing, corrupt or empty, or no table at all.
    """
    files = None if path.is_dir() and _is_saved_dataset(path) else table_files(path, split)
    empty = True
    for item in _read_saved_dataset(path, split) if files is None else (item for file in files for item in _read_file(file)):
        empty = False
        yield item
    if empty:
        raise DataError(f"{path}: no record in it")


def table_files(path: Path, split: str = "train") -> list[Path]:
    """The files that `stream_records` reads, but for a folder made by save_to_disk: the path itself, or a folder's tables by name.

    Where names of files or of their folders tell splits apart (train-00000-of-00002.parquet, test/part.jsonl), only those of `split`.

    Raises:
        DataError: there is none.
    """
    if not path.is_dir():
        return [path]
    tables = [
        file for file in sorted(path.rglob("*"))
        if file.name.endswith(SUFFIXES) and file.name not in _DESCRIPTIONS and file.is_file()
    ]  # fmt: skip
    if not tables:
        raise DataError(f"{path}: the folder holds no table ({', '.join(SUFFIXES)}) and was not made by datasets' save_to_disk")
    splits = {file: _split_of(str(file.relative_to(path)).lower()) for file in tables}
    if not any(splits.values()):
        return tables
    chosen = [file for file in tables if splits[file] == _SAME_SPLIT.get(split, split)]
    if not chosen:
        raise DataError(f"{path}: no split {split!r}; there are {', '.join(sorted({name for name in splits.values() if name}))}")
    return chosen


def _split_of(name: str) -> str | None:
    found = _SPLIT.search(name)
    return _SAME_SPLIT.get(found[1], found[1]) if found else None


def _read_file(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.name.endswith(".parquet"):
        return _read_parquet(path)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _read_lines(path)
    if path.name.endswith(".json"):
        return read_records(path)
    raise DataError(f"{path}: expected {', '.join(SUFFIXES)} or a folder")


def _read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        with _open_table(path) as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                record = parse_json(_decode(line, where), where)
                if not isinstance(record, dict):
                    raise DataError(f"{where}: expected an object, found {type(record).__name__}")
                yield where, record
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:  # gzip tells a cut file with EOFError
        raise DataError(f"{path}: cannot be read after line {number} ({error})") from error


def _open_table(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _decode(line: bytes, where: str) -> str:
    try:
        return line.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from error


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            for rows in table.iter_batches(batch_size=_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{path}: cannot be read after row {number} ({str(error).splitlines()[0]})") from error


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def _read_saved_dataset(folder: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a folder made by save_to_disk, which stays on the disk."""
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever datasets and Arrow raise at a damaged folder
        raise DataError(f"{folder}: cannot be read as a datasets folder ({str(error).splitlines()[0]})") from error
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            raise DataError(f"{folder}: no split {split!r}; there are {', '.join(sorted(dataset))}")
        dataset = dataset[split]
    for number, row in enumerate(dataset, start=1):
        yield f"{folder} row {number}", row
