"""Records from every kind of file, and what is said of broken ones."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.data.record_files import parse_object, read_records, stream_lines, table_files
from megatron_r1.errors import DataError

ROWS = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "c"}, {"n": 3, "text": "d"}]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def zstd(content: bytes) -> bytes:
    import pyarrow

    return pyarrow.compress(content, codec="zstd", asbytes=True)


PACK = {"": bytes, ".gz": gzip.compress, ".zst": lambda content: zstd(content[:20]) + zstd(content[20:])}


@pytest.mark.parametrize("packed", PACK)
def test_packed_files_hold_what_others_hold(tmp_path, packed):
    lines = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS).encode()
    for name, content in (("a.jsonl", lines), ("a.json", lines + b"\n"), ("b.json", json.dumps(ROWS).encode())):
        path = tmp_path / (name + packed)
        path.write_bytes(PACK[packed](content))
        assert [record for _, record in read_records(path)] == ROWS
    path = tmp_path / f"a.csv{packed}"
    path.write_bytes(PACK[packed]("n,text\n1,a\u2028b\n2,c\n3,d\n".encode("utf-8-sig")))
    assert list(read_records(path)) == [(f"{path}:{n + 2}", {**row, "n": str(n + 1)}) for n, row in enumerate(ROWS)]
    assert len(list(read_records(tmp_path))) == 4 * len(ROWS)


def test_lines_of_objects_in_a_json_file_are_counted_as_lines(tmp_path):
    path = tmp_path / "x.json"
    path.write_text('\n{"a": "b\u2028c"}\n\n{"a": [\n')
    records = read_records(path)
    assert next(records) == (f"{path}:2", {"a": "b\u2028c"})
    with pytest.raises(DataError, match="x.json:4: bad JSON"):
        next(records)
    path.write_text('{"a": 1}')
    assert list(read_records(path)) == [(f"{path}:1", {"a": 1})]
    path.write_text('[\n{"a": 1},\n{"a": 2}]')
    assert [record for _, record in read_records(path)] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "json", "parquet", "folder", "saved", "saved splits"])
def test_records_are_the_same_from_every_kind_of_file(tmp_path, kind):
    path, third = tmp_path / f"rows.{kind}", "row 3"
    if kind == "jsonl":
        write_jsonl(path, ROWS)
        third = ":5"
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress("\n".join(map(json.dumps, ROWS)).encode()))
        third = ":3"
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
        third = " item 3"
    elif kind == "parquet":
        write_parquet(path, ROWS)
    elif kind == "folder":
        path = tmp_path / "tables"
        write_parquet(path / "data/train-00000-of-00002.parquet", ROWS[:1])
        write_jsonl(path / "data/train-00001-of-00002.jsonl", ROWS[1:])
        write_parquet(path / "data/test-00000-of-00001.parquet", ROWS)
        (path / "dataset_infos.json").write_text("{}")
        third = ":3"
    else:
        import datasets

        path = tmp_path / "saved"
        rows = datasets.Dataset.from_list(ROWS)
        (rows if kind == "saved" else datasets.DatasetDict({"test": rows.select([0]), "train": rows})).save_to_disk(path)
    found = list(read_records(path))
    assert [record for _, record in found] == ROWS
    assert found[2][0].startswith(str(path)) and found[2][0].endswith(third)


def test_a_split_of_a_folder(tmp_path):
    write_jsonl(tmp_path / "valid/a.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "training_set.jsonl", ROWS[1:])
    write_jsonl(tmp_path / "latest.jsonl", ROWS)
    assert table_files(tmp_path, "validation") == [tmp_path / "valid/a.jsonl"]
    assert table_files(tmp_path) == [tmp_path / "training_set.jsonl"]
    with pytest.raises(DataError, match="no split 'test'; there are train, validation"):
        table_files(tmp_path, "test")
    (tmp_path / "training_set.jsonl").unlink()
    (tmp_path / "valid/a.jsonl").unlink()
    assert table_files(tmp_path, "test") == [tmp_path / "latest.jsonl"], "where no name tells, everything is meant"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.jsonl", b'{"a": 1}\n{"a": \n', "x.jsonl:2: bad JSON"),
        ("x.jsonl", b'{"a": 1}\n\n[1]\n', "x.jsonl:3: expected an object, found list"),
        ("x.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "x.jsonl:2: not UTF-8 text"),
        ("x.jsonl", b"\n\n", "x.jsonl: the file is empty"),
        ("x.jsonl", None, "x.jsonl: no such file"),
        ("x.json", b'{\n"a": 1}', "x.json: expected a list of objects"),
        ("x.json", b'{"a": 1}\n{"a": \n', "x.json:2: bad JSON"),
        ("x.json", b'{"a": 1}\n[1]\n', "x.json:2: expected an object, found list"),
        ("x.json", b'"a"', "x.json: expected a list of objects"),
        ("x.jsonl.zst", zstd(b'{"a": 1}\n' * 9)[:-5], "x.jsonl.zst: cannot be read after line"),
        ("x.jsonl.zst", b'{"a": 1}\n', "x.jsonl.zst: cannot be read after line 0"),
        ("x.jsonl.zst", b"", "x.jsonl.zst: the file is empty"),
        ("x.jsonl.zst", None, "x.jsonl.zst: no such file"),
        ("x.json.zst", b"[]", "x.json.zst: cannot be read"),
        ("x.csv.gz", gzip.compress(b"a,b\n1,2\n", mtime=0)[:-9], "x.csv.gz: not a readable CSV file"),
        ("x.csv.zst", b"a,b\n", "x.csv.zst: not a readable CSV file"),
        ("x.bz2", b"", "x.bz2: expected .jsonl"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "x.jsonl.gz: cannot be read after line"),
        ("x.jsonl.gz", b'{"a": 1}\n', "x.jsonl.gz: cannot be read after line 0"),
        ("x.parquet", b"PAR1 no", "x.parquet: cannot be read after row 0"),
        ("x.parquet", None, "x.parquet: no such file"),
        ("x.txt", b"a,b\n", "x.txt: expected .jsonl"),
        ("saved/state.json", b"{", "saved: cannot be read as a datasets folder"),
        ("empty/readme.txt", b"", "empty: the folder holds no table"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, says):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_records(path.parent if "/" in name else path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_lines_before_a_broken_one_are_given_first(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n{')
    records = read_records(tmp_path / "x.jsonl")
    assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]


def test_a_csv_file_with_a_header(tmp_path):
    path = tmp_path / "x.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["a", "b"], ["1", "two\nlines"], ["3", "4"]])
    assert list(read_records(path)) == [(f"{path}:3", {"a": "1", "b": "two\nlines"}), (f"{path}:4", {"a": "3", "b": "4"})]
    path.write_text("a,b\n1\n")
    with pytest.raises(DataError, match="x.csv:2: fewer cells than the header has"):
        list(read_records(path))


def test_without_a_split_every_file_is_read(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS[:1])
    write_jsonl(tmp_path / "test.jsonl", ROWS[1:])
    assert len(list(read_records(tmp_path, split=None))) == 3
    assert len(list(read_records(tmp_path))) == 1


def test_lines_are_found_again_by_their_offsets(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": "\u00e9"}\n\n{"a": 2}\n', encoding="utf-8-sig")
    lines = list(stream_lines(path))
    assert [parse_object(line.raw, line.where) for line in lines] == [{"a": "\u00e9"}, {"a": 2}]
    with path.open("rb") as file:
        for line in lines:
            file.seek(line.offset)
            assert file.readline() == line.raw
    assert [line.where for line in lines] == [f"{path}:1", f"{path}:3"]
