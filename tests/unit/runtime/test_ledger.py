"""Append-only files of records."""

from __future__ import annotations

import pytest

from megatron_r1.errors import DataError
from megatron_r1.runtime.ledger import Ledger


def test_a_ledger_keeps_an_id_once_and_belongs_to_one_process(tmp_path):
    path = tmp_path / "l.jsonl"
    with Ledger(path) as ledger:
        ledger.append([{"id": "a", "x": 1}, {"id": "b", "x": "\udcff"}])
        ledger.append([{"id": "a", "x": 2}])
        with pytest.raises(DataError, match="is being written by another process"):
            Ledger(path)
    with path.open("a") as file:
        file.write('{"id": "c"}')  # whole, but its append had not returned
    with Ledger(path) as ledger:
        assert ledger.records == {"a": {"id": "a", "x": 1}, "b": {"id": "b", "x": "\udcff"}}
    with path.open("a") as file:
        file.write('{"id": "a"}\n')
    with pytest.raises(DataError, match="l.jsonl:3: the id 'a' stands there twice"):
        Ledger(path)


def test_a_damaged_line_is_named_and_one_that_a_kill_cut_is_removed(tmp_path):
    path = tmp_path / "l.jsonl"
    path.write_bytes(b'{"id": "a"}\n{"id": \n{"id": "c"}\n')
    with pytest.raises(DataError, match=r"l.jsonl:2: bad JSON .*; remove the line"):
        Ledger(path)
    path.write_bytes(b'{"id": "a"}\n{"id": ')
    with Ledger(path) as ledger:
        assert list(ledger.records) == ["a"]
    assert path.read_bytes() == b'{"id": "a"}\n'
    path.write_bytes(b'{"id": "a"}\n{"name": "b"}\n')
    with pytest.raises(DataError, match="l.jsonl:2: not a line of this file"):
        Ledger(path)
    assert path.read_bytes().endswith(b'"b"}\n'), "nothing is removed from a file of another kind"
