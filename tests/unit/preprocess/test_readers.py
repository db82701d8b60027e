"""Files as strangers have them: packed and cut, with marks and other line ends, and columns of any type."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_r1.errors import DataError
from megatron_r1.preprocess.readers import ReadOptions, read_units, text_of
from megatron_r1.preprocess.sources import find_sources

TEXTS = [f"text {n}" for n in range(3)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()
FIRST = LINES.index(b"\n") + 1
MANY = b"".join(json.dumps({"text": f"{n} " + "word " * (n % 50)}).encode() + b"\n" for n in range(20_000))
SMALL = ReadOptions(most_bytes=1000)


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, "zstd", asbytes=True)


def texts_in(path: Path, content: bytes | None = None, options: ReadOptions = SMALL) -> list:
    """The documents, with the message in the place of a bad one."""
    if content is not None:
        path.write_bytes(content)
    (source,), _ = find_sources([path])
    found = []
    for unit in read_units(source, options):
        if unit.raw is not None:
            try:
                found.append(text_of(unit, source, options))
            except DataError as error:
                found.append(error)
    return found


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("cut.jsonl.gz", gzip.compress(MANY)[:-100]),
        ("head.jsonl.gz", gzip.compress(MANY)[:7]),
        ("sum.jsonl.gz", gzip.compress(MANY)[:-8] + b"abcd" + gzip.compress(MANY)[-4:]),
        ("other.jsonl.gz", MANY),
        ("more.jsonl.gz", gzip.compress(LINES) + b"garbage"),
        ("cut.jsonl.zst", zstd(MANY)[:-100]),
        ("last.jsonl.zst", zstd(MANY)[:-1]),
        ("head.jsonl.zst", zstd(MANY)[:3]),
        ("other.jsonl.zst", MANY),
        ("more.jsonl.zst", zstd(LINES) + b"garbage"),
        ("quote.csv", b'id,text\n1,"' + b"word " * 10_000),
        ("cut.parquet", b"PAR1" + b"\0" * 1000),
    ],
)
def test_a_damaged_file_is_named_and_never_ends_early(tmp_path, name, content):
    with pytest.raises(DataError) as found:
        texts_in(tmp_path / name, content)
    assert name in str(found.value) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("crlf.jsonl", LINES.replace(b"\n", b"\r\n") + b"\r\n\r\n"),
        ("mark.jsonl", b"\xef\xbb\xbf" + LINES),
        ("marked_blank.jsonl", b"\xef\xbb\xbf\r\n\n \t\n" + LINES + b"\xef\xbb\xbf"),
        ("marked_inside.jsonl", LINES[:FIRST] + b"\xef\xbb\xbf" + LINES[FIRST:]),
        ("no_end.jsonl", LINES[:-1]),
        ("members.jsonl.gz", gzip.compress(LINES[:FIRST]) + gzip.compress(b"") + gzip.compress(LINES[FIRST:])),
        ("frames.jsonl.zst", zstd(LINES[:FIRST]) + zstd(LINES[FIRST:])),
        ("mark.txt", b"\xef\xbb\xbf\r\n\r\n" + "\r\n\r\n".join(TEXTS).encode()),
        ("mark.csv", b"\xef\xbb\xbftext\r\n" + "\r\n".join(TEXTS).encode()),
    ],
)
def test_marks_ends_of_lines_and_blank_ones_change_nothing(tmp_path, name, content):
    assert texts_in(tmp_path / name, content) == TEXTS


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (b"\0" * 500, "bad JSON"),
        (b"\0" * 2_000_000, "longer than"),
        (b'{"text": "' + b"word " * 400_000 + b'"}', "longer than"),
        (b"[" * 100_000, "longer than"),
        (b"[" * 5000, "bad JSON"),
        (b'{"text": ' + b"1" * 5000 + b"}", "bad JSON"),
        ('{"text": "a"}'.encode("utf-16"), "not UTF-8"),
        (b'{"\\ud83d": "a"}', "field 'text' is missing; the record has '\\ud83d'"),
        (b'{"text": NaN}', "has no value"),
        (b'{"text": {"text": "a"}}', "is dict, not text"),
    ],
)
def test_a_bad_line_is_one_document_and_the_next_is_read(tmp_path, line, told):
    for name, pack in (("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress)):
        before, bad, *after = texts_in(tmp_path / name, pack(LINES[:FIRST] + line + b"\n" + LINES[FIRST:]))
        assert [before, *after] == TEXTS and told in str(bad), bad


def column(value: object) -> pyarrow.Table:
    return pyarrow.table({"text": value})


def not_text() -> pyarrow.Array:
    offsets, content = pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0\4\0\0\0"), pyarrow.py_buffer(b"\xff\xfeab")
    return pyarrow.Array.from_buffers(pyarrow.string(), 2, [None, offsets, content])


@pytest.mark.parametrize(
    ("table", "wanted"),
    [
        (column(pyarrow.array(["aa", "b", "aa"]).dictionary_encode()), ["aa", "b", "aa"]),
        (column(pyarrow.array(["aa", "b"], pyarrow.large_string())), ["aa", "b"]),
        (column(["a", None, "b"]), ["a", "has no value", "b"]),
        (column(pyarrow.nulls(2)), ["has no value", "has no value"]),
        (column([{"text": "a"}]), ["is dict, not text"]),
        (column([["a", "b"]]), ["is list, not text"]),
        (column([b"a"]), ["is bytes, not text"]),
        (column([1]), ["is int, not text"]),
        (column(not_text()), ["is not UTF-8 text", "ab"]),
    ],
)
def test_columns_of_every_type(tmp_path, table, wanted):
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    found = texts_in(tmp_path / "a.parquet")
    assert len(found) == len(wanted) and all(text in str(given) for given, text in zip(found, wanted))


def test_the_column_is_the_one_that_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"a": [{"b": "inner"}], "a.b": ["outer"]}), path)
    assert texts_in(path, options=ReadOptions("a.b")) == ["outer"]
    twice = pyarrow.Table.from_arrays([pyarrow.array(["a"]), pyarrow.array(["b"])], names=["text", "text"])
    for table, told in ((twice, "'text' is there 2 times"), (pyarrow.table({"meta": [{"text": "a"}]}), "'text' is missing")):
        pyarrow.parquet.write_table(table, path)
        with pytest.raises(DataError, match=told):
            texts_in(path)
