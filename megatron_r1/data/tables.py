"""Rows of Parquet files and of folders that Hugging Face `datasets` saved, with errors that name the file and the row."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from megatron_r1.data.records import read_records
from megatron_r1.errors import DataError

_SPLITS, _STATE = "dataset_dict.json", "state.json"  # what `save_to_disk` writes beside the rows


def read_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of a .parquet file, of a folder of them or of one dataset saved by `datasets`; else `read_records`.

    Raises:
        DataError: missing, empty or broken, or a folder that holds neither.
    """
    if path.is_dir():
        rows = (row for file in _find_files(path) for row in _read_table(file))
    elif path.suffix == ".parquet":
        rows = _read_table(path)
    else:
        yield from read_records(path)
        return
    empty = True
    for row in rows:
        empty = False
        yield row
    if empty:
        raise DataError(f"{path}: there are no rows")


def _find_files(folder: Path) -> list[Path]:
    if (folder / _SPLITS).is_file():
        splits = sorted(child.name for child in folder.iterdir() if (child / _STATE).is_file())
        raise DataError(f"{folder} holds the splits {', '.join(splits)}: give the folder of one of them")
    if (folder / _STATE).is_file():
        try:
            return [folder / entry["filename"] for entry in json.loads((folder / _STATE).read_text())["_data_files"]]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / _STATE}: not what datasets writes") from error
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise DataError(f"{folder} holds neither .parquet files nor a dataset saved by Hugging Face datasets")
    return files


def _read_table(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    number = 0
    try:
        rows = (row for batch in _read_batches(path) for row in batch.to_pylist())
        for number, row in enumerate(rows, start=1):
            yield f"{path} row {number}", row
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read after row {number} ({str(error).splitlines()[0]})") from error


def _read_batches(path: Path) -> Iterator[pyarrow.RecordBatch]:
    if path.suffix == ".parquet":
        with pyarrow.parquet.ParquetFile(path) as file:
            yield from file.iter_batches()
    else:
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from stream
