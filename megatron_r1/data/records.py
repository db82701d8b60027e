"""Reading .jsonl and .json files, also gzipped, with errors that name the file and the line."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_r1.errors import DataError


def read_text(path: Path) -> str:
    """The whole file, unpacked where its name ends in .gz.

    Raises:
        DataError: missing, unreadable, not UTF-8 or blank.
    """
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if not text.strip():
        raise DataError(f"{path}: the file is empty")
    return text


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The objects of a .jsonl file (one a line, blank lines skipped) or of a .json file (one list), each with "file:line".

    Either may be gzipped, its name then ending in .gz.

    Raises:
        DataError: what `read_text` raises, another suffix, bad JSON, or something that is not an object.
    """
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    if suffix not in (".jsonl", ".json"):
        raise DataError(f"{path}: expected a .jsonl file (one object a line) or a .json file (a list of objects)")
    text = read_text(path)
    entries = _read_json_lines(path, text) if suffix == ".jsonl" else _read_json_list(path, text)
    for where, entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
        yield where, entry


def take_text(record: dict[str, Any], field: str, where: str) -> str:
    """The stripped text of a field; a number counts as its text.

    Raises:
        DataError: the field is missing, blank or neither text nor number.
    """
    if field not in record:
        raise DataError(f"{where}: field {field!r} is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    value = record[field]
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise DataError(f"{where}: field {field!r} is {type(value).__name__}, not text")
    text = str(value).strip()
    if not text:
        raise DataError(f"{where}: field {field!r} is blank")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise DataError(f"{where}: field {field!r} has half a surrogate pair (\\ud800 to \\udfff alone), which is not text")
    return text


def parse_json(text: str, where: str) -> Any:
    """What the text stands for.

    Raises:
        DataError: bad JSON, told on one line.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
        raise DataError(f"{where}: bad JSON ({str(error).splitlines()[0]})") from error


def _read_json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also splits at U+2028 and friends, which JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{path}:{number}", parse_json(line, f"{path}:{number}")


def _read_json_list(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    entries = parse_json(text, str(path))
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of objects")
    if not entries:
        raise DataError(f"{path}: the list is empty")
    for number, entry in enumerate(entries, start=1):
        yield f"{path} item {number}", entry
