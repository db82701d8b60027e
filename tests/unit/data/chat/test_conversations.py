"""Conversations from every form of record and every kind of file, and what is said of broken ones."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_r1.data.chat.conversations import Message, read_conversation
from megatron_r1.data.record_files import stream_records, table_files
from megatron_r1.errors import DataError
from tests.paths import ROOT

SHARED = ROOT.parent / "shared/data"
HELLO = [Message("user", "Hello?"), Message("assistant", "Hi!")]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Hi!\n"}]
SHAREGPT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi!"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, [Message("system", "Be kind."), *HELLO]),
        ({"conversations": SHAREGPT}, HELLO),
        ({"prompt": "Hello?", "response": "Hi!"}, HELLO),
        ({"instruction": "Hello?", "input": "", "output": "Hi!"}, HELLO),
        ({"instruction": "Say it", "input": "twice", "output": "Hi!"}, [Message("user", "Say it\ntwice"), HELLO[1]]),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}}, HELLO),
        ({"prompt": "Hello?", "chosen": "Hi!", "rejected": "No."}, HELLO),
        ({"prompt": "Hello?", "chosen": CHAT, "rejected": CHAT}, HELLO),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, HELLO),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi!\n\nHuman: x\ny\n\nAssistant: z", "rejected": ""},
         [*HELLO, Message("user", "x\ny"), Message("assistant", "z")]),
    ],
)  # fmt: skip
def test_each_form_is_told_by_its_fields(record, expected):
    assert read_conversation(record, "x:1") == expected


def test_fields_of_pairs_and_the_form_can_be_named():
    record = {"question": "Hello?", "answer": "Hi!", "messages": []}
    assert read_conversation(record, "x:1", "pair", "question", "answer") == HELLO


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "x:1 message 1: role 'tool' is unknown; choose one of system, user"),
        ({"conversations": [*SHAREGPT, {"from": "function_call", "value": "x"}]}, "message 3: role 'function_call' is unknown"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "x:1 message 2: field 'content' is blank"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "message 2: field 'content' is NoneType, not text"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2: field 'content' is missing"),
        ({"messages": ["Hello?"]}, "message 1: expected an object, found str"),
        ({"messages": "Hello?"}, "expected a list of messages, found str"),
        ({"messages": CHAT[:1]}, "the conversation does not end with the assistant"),
        ({"messages": []}, "the conversation does not end with the assistant"),
        ({"prompt": "Hello?"}, "field 'response' is missing"),
        ({"instruction": "Hello?", "output": ""}, "field 'output' is blank"),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: "}, "x:1 message 2: field 'Assistant' is blank"),
        ({"chosen": "Hi!"}, "field 'chosen' is no dialogue"),
        ({"text": "Hi!"}, "no conversation in the fields 'text'; expected messages"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_on_one_line(record, says):
    with pytest.raises(DataError) as caught:
        read_conversation(record, "x:1")
    assert says in str(caught.value) and str(caught.value).startswith("x:1") and "\n" not in str(caught.value)


ROWS = [{"n": 1, "text": "a\u2028b"}, {"n": 2, "text": "c"}, {"n": 3, "text": "d"}]


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8-sig")


def write_parquet(path: Path, rows: list[dict]) -> None:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


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
    found = list(stream_records(path))
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
        ("x.jsonl", b"\n\n", "x.jsonl: no record in it"),
        ("x.jsonl", None, "x.jsonl: no such file"),
        ("x.json", b'{"a": 1}', "x.json: expected a list of objects"),
        ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99, mtime=0)[:-9], "x.jsonl.gz: cannot be read after line"),
        ("x.jsonl.gz", b'{"a": 1}\n', "x.jsonl.gz: cannot be read after line 0"),
        ("x.parquet", b"PAR1 no", "x.parquet: cannot be read after row 0"),
        ("x.parquet", None, "x.parquet: no such file"),
        ("x.csv", b"a,b\n", "x.csv: expected .jsonl"),
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
        list(stream_records(path.parent if "/" in name else path))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_the_lines_before_a_broken_one_are_given_first(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"a": 2}\n{')
    records = stream_records(tmp_path / "x.jsonl")
    assert [next(records)[1], next(records)[1]] == [{"a": 1}, {"a": 2}]


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs the published chat and preference files")
def test_published_files_are_read_whole():
    turns = {}
    for name in ("chat/alpaca_en_demo.json", "chat/identity.json", "preference/dpo_en_demo.json", "preference/dpo_zh_demo.json"):
        conversations = [read_conversation(record, where) for where, record in stream_records(SHARED / name)]
        turns[name] = (len(conversations), max(map(len, conversations)))
    assert list(turns.values()) == [(999, 2), (91, 2), (300, 14), (300, 3)]
    blank = []
    for where, record in stream_records(SHARED / "preference/hh_harmless.jsonl.gz"):
        try:
            read_conversation(record, where)
        except DataError as error:
            blank.append(str(error))
    assert len(blank) == 4 and all("field 'Assistant' is blank" in line for line in blank)
