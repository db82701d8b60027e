"""Rows of a local copy of a benchmark: what `data.record_files` reads, and CSV, in which GPQA is published."""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.data.record_files import stream_records
from megatron_r1.errors import DataError

Row = tuple[str, dict[str, Any]]  #: where it stands, for messages, and its fields


def read_rows(path: Path, split: str) -> Iterator[Row]:
    """The rows of a file or folder; of a folder of several splits, those of `split`.

    Raises:
        DataError: file and line of what is missing or broken.
    """
    return _read_csv(path) if path.suffix == ".csv" else stream_records(path, split)


def _read_csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(sys.maxsize)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for record in reader:
                if None in record or None in record.values():
                    raise DataError(f"{path}:{reader.line_num}: {'more' if None in record else 'fewer'} cells than the header has")
                yield f"{path}:{reader.line_num}", record
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (csv.Error, UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path}: not a readable CSV file ({error})") from error
