"""Records of files in any of the usual forms, one at a time, each with its place.

    FILE.jsonl      one object a line, read line by line
    FILE.json       one list of objects, or one object a line
    FILE.csv        a header and one record a row
    FILE.parquet    read a few rows at a time
    a pipe          one object a line, if its name does not say otherwise
    FOLDER          a `datasets` folder made by save_to_disk, or a folder of such files

All but Parquet may be packed by gzip or zstd: FILE.jsonl.gz, FILE.csv.zst.

This is the only module that reads records: every error names the file and the line, item or row.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
import re
import sys
import zlib
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from megatron_r1.data.unpacked import PACKED, is_piped, open_unpacked, read_once
from megatron_r1.errors import DataError

Record = tuple[str, dict[str, Any]]  #: where it stands, for messages, and its fields

SUFFIXES = (*(form + packed for form in (".jsonl", ".json", ".csv") for packed in ("", *PACKED)), ".parquet")
_SPLIT = re.compile(r"(?:^|[^a-z])(train|training|valid|validation|dev|test|eval)(?:[^a-z]|$)")
_SURROGATE = re.compile("[\ud800-\udfff]")
_SAME_SPLIT = {"training": "train", "valid": "validation", "dev": "validation", "eval": "test"}
_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what save_to_disk writes beside the rows
_DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", _SPLITS, _STATE}
_ROWS = 256  # of a parquet file in memory at a time


class RawLine(NamedTuple):
    """A line of a file."""

    where: str  #: "file:line"
    offset: int  #: bytes before it
    raw: bytes


def read_records(path: Path, split: str | None = "train", most_cell: int = sys.maxsize) -> Iterator[Record]:
    """Every record with where it stands ("file.jsonl:3", "file.json item 3", "file.parquet row 3"), in the order of the files.

    Args:
        path: see above.
        split: of a folder that holds several; None: all files of a folder, and a folder of several saved datasets is an error.
        most_cell: characters of a cell of CSV, which is in memory whole: a quote that nobody closes makes one cell of a file.

    Raises:
        DataError: one line with file and line of what is missing, corrupt or empty, or no table at all.
    """
    if path.is_dir() and _is_saved_dataset(path):
        records = _read_saved_dataset(path, split)
    elif path.is_dir():
        records = (record for file in table_files(path, split) for record in _read_file(file, most_cell))
    else:
        records = _read_file(path, most_cell)
    empty = True
    for record in records:
        empty = False
        yield record
    if empty:
        raise DataError(f"{path}: no record in it" if path.is_dir() else f"{path}: the file is empty")


def table_files(path: Path, split: str | None = "train") -> list[Path]:
    """The files that `read_records` reads: the path itself, or the tables of a folder by name.

    If names of files or of their folders name splits (train-00000-of-00002.parquet, test/part.jsonl), only the files of `split`.

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
    if split is None or not any(splits.values()):
        return tables
    chosen = [file for file in tables if splits[file] == _SAME_SPLIT.get(split, split)]
    if not chosen:
        raise DataError(f"{path}: no split {split!r}; there are {', '.join(sorted({name for name in splits.values() if name}))}")
    return chosen


def stream_lines(path: Path) -> Iterator[RawLine]:
    """The lines of a .jsonl file that are not blank, one at a time. Offsets count the unpacked bytes.

    Raises:
        DataError: another suffix, a file that cannot be read, or one without a line.
    """
    if _form_of(path) != ".jsonl":
        raise DataError(f"{path}: expected a .jsonl file, one object a line")
    number = offset = 0
    found = False
    try:
        with open_unpacked(path) as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    found = True
                    yield RawLine(f"{path}:{number}", offset, raw)
                offset += len(raw)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # gzip says EOFError of a cut file
        raise DataError(f"{path}: cannot be read after line {number}: not a whole gzip file ({error})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read after line {number} ({error.strerror or error})") from error
    if not found:
        raise DataError(f"{path}: the file is empty")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        DataError: bad JSON, not UTF-8, or something that is no object.
    """
    try:
        text = raw.decode("utf-8-sig")  # a byte order mark may begin the first line
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start} of the line)") from error
    return _check_object(_parse_json(text, where), where)


def read_text(path: Path) -> str:
    """The whole file, unpacked if its name ends in .gz or .zst.

    Raises:
        DataError: missing, unreadable, not UTF-8 or blank.
    """
    try:
        with open_unpacked(path) as file:
            text = file.read().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def is_missing(value: Any) -> bool:
    """Whether a field has no value: null, or the NaN that tables of numbers have instead."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def take_text(record: dict[str, Any], field: str, where: str) -> str:
    """The stripped text of a field; a number counts as its text.

    Raises:
        DataError: the field is missing, blank or neither text nor number.
    """
    if field not in record:
        raise DataError(f"{where}: field {field!r} is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    if isinstance(value, (float, Decimal)) and not math.isfinite(value):
        raise DataError(f"{where}: field {field!r} is {value}, which is {'a missing value' if is_missing(value) else 'no number'}")
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: field {field!r} is blank")
    if _SURROGATE.search(text):
        raise DataError(f"{where}: field {field!r} has half a surrogate pair (\\ud800 to \\udfff alone), which is not text")
    return text


def _split_of(name: str) -> str | None:
    found = _SPLIT.search(name)
    return _SAME_SPLIT.get(found[1], found[1]) if found else None


def _form_of(path: Path) -> str:
    """The suffix that tells the form of a file: what stands before .gz and .zst. A pipe without one holds objects a line."""
    form = Path(path.stem).suffix if path.suffix in PACKED else path.suffix
    return ".jsonl" if not form and is_piped(path) else form


def _read_file(path: Path, most_cell: int) -> Iterator[Record]:
    form = _form_of(path)
    if form == ".jsonl":
        return ((line.where, parse_object(line.raw, line.where)) for line in stream_lines(path))
    if form == ".json":
        return _read_json_file(path)
    if form == ".csv":
        return _read_csv(path, most_cell)
    if path.suffix == ".parquet":
        return _read_parquet(path)
    raise DataError(f"{path}: expected {', '.join(SUFFIXES)} or a folder")


def _read_json_file(path: Path) -> Iterator[Record]:
    text = read_text(path)
    if _begins_with_object_line(text):  # as datasets and pandas write .json
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                where = f"{path}:{number}"
                yield where, _check_object(_parse_json(line, where), where)
        return
    entries = _parse_json(text, str(path))
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of objects, or one object a line")
    if not entries:
        raise DataError(f"{path}: the list is empty")
    for number, entry in enumerate(entries, start=1):
        where = f"{path} item {number}"
        yield where, _check_object(entry, where)


def _begins_with_object_line(text: str) -> bool:
    first = text.lstrip().partition("\n")[0]
    try:
        return first.startswith("{") and isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        raise DataError(f"{where}: bad JSON ({str(error).splitlines()[0]})") from error


def _check_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f"{where}: expected an object, found {type(value).__name__}")
    return value


def _read_csv(path: Path, most_cell: int) -> Iterator[Record]:
    csv.field_size_limit(most_cell)
    try:
        with open_unpacked(path) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise DataError(f"{path}:{reader.line_num}: {'more' if None in record else 'fewer'} cells than the header has")
                yield f"{path}:{reader.line_num}", record
                csv.field_size_limit(most_cell)  # it is the process's: another file may have been read meanwhile
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(read_once(path)) as table:
            for rows in table.iter_batches(batch_size=_ROWS):
                for row in rows.to_pylist():
                    number += 1
                    yield f"{path} row {number}", row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, pyarrow.ArrowException, ValueError, OverflowError) as error:  # ValueError: text that is no UTF-8, odd dates
        raise DataError(f"{path}: cannot be read after row {number} ({str(error).splitlines()[0]})") from error


def _is_saved_dataset(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (_STATE, _SPLITS))


def _read_saved_dataset(folder: Path, split: str | None) -> Iterator[Record]:
    """The rows of a folder made by save_to_disk, which stays on the disk."""
    import datasets

    if split is None and (folder / _SPLITS).is_file():
        splits = sorted(child.name for child in folder.iterdir() if (child / _STATE).is_file())
        raise DataError(f"{folder} holds the splits {', '.join(splits)}: give the folder of one of them")
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
