"""The documents of a source, piece by piece: memory depends on the longest document alone."""

from __future__ import annotations

import gzip
import zlib
from codecs import BOM_UTF8
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from megatron_r1.data.record_files import is_missing, parse_object, read_records
from megatron_r1.data.unpacked import open_unpacked, packed_position
from megatron_r1.errors import DataError, one_line
from megatron_r1.preprocess.sources import Source

_ESCAPED = 6  # bytes that a byte of text takes in JSON at most, as in \u0001
_ROWS, _ROWS_BYTES = 256, 4 << 20  # of a Parquet file at a time: at most so many, and so many bytes of mean ones
_PARQUET_BUFFER = 1 << 20  # bytes: without it a whole column of a row group is read at once


@dataclass(frozen=True)
class ReadOptions:
    """What of a source is a document."""

    text_field: str = "text"
    documents: Literal["paragraphs", "lines", "files"] = "paragraphs"  #: of text files
    most_bytes: int = 4 << 20  #: of a document
    sentences: bool = False  #: a list of texts is a document whose sentences are known


class Unit(NamedTuple):
    """What may become a document."""

    position: int  #: unpacked bytes before it, of Parquet and CSV bytes of text: these decide its part
    number: int  #: of its line or row, counted from 1 where reading began
    raw: Any  #: None: a blank line, which is no document
    done: int  #: bytes of the file that were read so far


class TooLong(NamedTuple):
    """Stands for what is longer than a document may be."""

    limit: int


class _Cell(NamedTuple):
    """A row of a Parquet file's column."""

    column: Any
    row: int


def place_of(source: Source, number: int) -> str:
    """Where a unit stands, for messages; `number` counts from the beginning of the source."""
    return f"{source.path} row {number}" if source.kind == "parquet" else f"{source.path}:{number}"


def read_units(source: Source, options: ReadOptions, start: int = 0) -> Iterator[Unit]:
    """Every unit of a source in order; every line of a seekable one.

    Args:
        source: the file.
        options: what is a document.
        start: of a seekable source: begin with the first line that starts there or later, and count lines from 1 there.

    Raises:
        DataError: the file is damaged, so that nothing of it can be read from there on.
    """
    if source.kind == "parquet":
        yield from _parquet_rows(source, options)
    elif source.kind == "csv":
        yield from _csv_rows(source, options)
    else:
        with _opened(source) as file:
            if source.kind == "lines":
                yield from _raw_lines(file, source.seekable, start, _ESCAPED * options.most_bytes)
            elif options.documents == "lines":
                yield from _raw_lines(file, False, 0, options.most_bytes)
            else:
                yield from _passages(file, options.most_bytes, options.documents == "files")


def count_lines(source: Source, end: int) -> int:
    """Lines that start before byte `end` of a seekable source, of which one starts there or later."""
    lines, piece = 0, b"\n"
    with _opened(source) as file:
        while end > 0 and (piece := file.read(min(end, 1 << 20))):
            lines += piece.count(b"\n")
            end -= len(piece)
        if piece[-1:] != b"\n":
            lines += 1  # the one that goes on there
    return lines


def text_of(unit: Unit, source: Source, options: ReadOptions) -> str | list[str]:
    """The text of a document, as it stands there; paragraphs and whole files without the space around them.

    Returns:
        One text, or with `options.sentences` the texts of a list.

    Raises:
        DataError: there is none. The message does not say where.
    """
    raw = unit.raw
    if isinstance(raw, TooLong):
        raise DataError(f"longer than {raw.limit >> 20} MB; cut it, or raise --most-document-mb")
    if source.kind == "text":
        try:
            value: Any = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise DataError(f"not UTF-8 text (byte {error.start} of it)") from None
        value = value.rstrip("\r\n") if options.documents == "lines" else value.strip()
    elif source.kind == "parquet":
        try:
            value = raw.column[raw.row].as_py()
        except UnicodeDecodeError as error:
            raise DataError(f"field {options.text_field!r} is not UTF-8 text (byte {error.start} of it)") from None
    else:
        value = _field_of(raw, options.text_field)
    texts = value if options.sentences and isinstance(value, list) and value else [value]
    for text in texts:
        _check_text(text, options)
    if not any(text and not text.isspace() for text in texts):
        raise DataError("an empty document")
    return value


def _field_of(raw: bytes | dict[str, Any], field: str) -> Any:
    try:
        record = raw if isinstance(raw, dict) else parse_object(raw, "")
    except DataError as error:
        raise DataError(str(error).removeprefix(": ")) from None
    if field not in record:
        raise DataError(f"field {field!r} is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    return record[field]


def _check_text(text: Any, options: ReadOptions) -> None:
    if is_missing(text):
        raise DataError(f"field {options.text_field!r} has no value")
    if not isinstance(text, str):
        raise DataError(f"field {options.text_field!r} is {type(text).__name__}, not text")
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError:
        raise DataError(
            f"field {options.text_field!r} has half a surrogate pair (\\ud800 to \\udfff alone), which is not text"
        ) from None
    if size > options.most_bytes:
        raise DataError(f"longer than {options.most_bytes >> 20} MB; cut it, or raise --most-document-mb")


@contextmanager
def _opened(source: Source) -> Iterator[BinaryIO]:
    try:
        with open_unpacked(Path(source.path)) as file:
            yield file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:  # gzip says EOFError of a cut file
        raise DataError(f"{source.path}: not a whole gzip file ({one_line(error)})") from None
    except OSError as error:
        raise DataError(f"{source.path}: cannot be read ({error.strerror or one_line(error)})") from None


def _raw_lines(file: BinaryIO, is_plain: bool, start: int, most: int) -> Iterator[Unit]:
    position = 0
    if start:
        file.seek(start - 1)
        position = start - 1
        while piece := file.readline(1 << 20):  # the end of a line that starts before; nothing but its end, if one starts here
            position += len(piece)
            if piece.endswith(b"\n"):
                break
    number = 0
    while line := file.readline(most + 1):
        number += 1
        size = len(line)
        raw: bytes | TooLong = line
        while len(line) > most and not line.endswith(b"\n"):
            raw = TooLong(most)
            if not (line := file.readline(most + 1)):
                break
            size += len(line)
        is_blank = not isinstance(raw, TooLong) and _is_blank(raw)
        yield Unit(position, number, None if is_blank else raw, position + size if is_plain else packed_position(file))
        position += size


def _is_blank(line: bytes) -> bool:
    """Whether there is nothing but space in a line, or a byte order mark, which may begin a file and stands for nothing."""
    return line.isspace() or (line[:3] == BOM_UTF8 and not line[3:].strip())


def _passages(file: BinaryIO, most: int, whole: bool) -> Iterator[Unit]:
    """Lines up to a blank one, or all of them. At most `most` bytes are kept of each."""
    kept: list[bytes] = []
    size = begin = first = 0
    for unit in _every_line(file, most):
        is_blank = not isinstance(unit.raw, TooLong) and _is_blank(unit.raw)
        if is_blank and not whole and size:
            yield Unit(begin, first, b"".join(kept) if size <= most else TooLong(most), unit.done)
            kept, size = [], 0
        if (is_blank and not whole) or (is_blank and not size):
            continue
        if not size:
            begin, first = unit.position, unit.number
        size += most + 1 if isinstance(unit.raw, TooLong) else len(unit.raw)
        if size <= most:
            kept.append(unit.raw)
        else:
            kept = []
    if size:
        yield Unit(begin, first, b"".join(kept) if size <= most else TooLong(most), packed_position(file))


def _every_line(file: BinaryIO, most: int) -> Iterator[Unit]:
    """Blank lines included; a longer one comes as `TooLong`, once for each piece of it."""
    position = number = 0
    begins = True
    while line := file.readline(most + 1):
        number += begins
        begins = line.endswith(b"\n")
        yield Unit(position, number, line if len(line) <= most else TooLong(most), packed_position(file))
        position += len(line)


def _csv_rows(source: Source, options: ReadOptions) -> Iterator[Unit]:
    position = 0
    for where, record in read_records(Path(source.path), most_cell=_ESCAPED * options.most_bytes):
        text = record.get(options.text_field)
        yield Unit(position, int(where.rpartition(":")[2]), record, min(position, source.size))
        position += len(text.encode("utf-8", "replace")) if isinstance(text, str) else 0


def _parquet_rows(source: Source, options: ReadOptions) -> Iterator[Unit]:
    import numpy as np
    import pyarrow
    import pyarrow.compute
    import pyarrow.parquet

    position = number = 0
    field = options.text_field
    try:
        with pyarrow.parquet.ParquetFile(source.path, buffer_size=_PARQUET_BUFFER) as table:
            if field not in (names := table.schema_arrow.names):
                raise DataError(f"{source.path}: field {field!r} is missing; the file has {', '.join(map(repr, names))}")
            if names.count(field) > 1:
                raise DataError(f"{source.path}: field {field!r} is there {names.count(field)} times; rename what is no text")
            total = max(1, table.metadata.num_rows)
            column_bytes = sum(_column_bytes(table.metadata.row_group(group), field) for group in range(table.num_row_groups))
            rows = max(1, min(_ROWS, _ROWS_BYTES * total // max(1, column_bytes)))
            for batch in table.iter_batches(batch_size=rows, columns=[field]):
                column = batch.column(field)  # a column a.b is not the b in a column a, which is read with it
                sizes = np.zeros(len(column), np.int64)
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    sizes += pyarrow.compute.fill_null(pyarrow.compute.binary_length(column), 0).to_numpy()
                else:
                    sizes += column.nbytes // max(1, len(column))
                for row, size in enumerate(sizes.tolist()):
                    number += 1
                    yield Unit(position, number, _Cell(column, row), source.size * number // total)
                    position += size
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{source.path}: cannot be read after row {number} ({one_line(error)})") from None


def _column_bytes(group: Any, field: str) -> int:
    """Unpacked bytes of a top-level column in a row group."""
    columns = (group.column(number) for number in range(group.num_columns))
    return sum(column.total_uncompressed_size for column in columns if column.path_in_schema.split(".")[0] == field)
