"""Ledgers of an evaluation and their settings."""

from __future__ import annotations

import json

import pytest

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.evaluation.sample_ledger import open_samples, read_settings

LINE = {"problem": "p", "sample": 0, "response": "\ud800\u2028\n", "finished": True, "tokens": 3}


def test_a_ledger_cuts_half_a_line_off_and_keeps_what_it_has(tmp_path):
    path = tmp_path / "folder" / "lines.jsonl"
    with open_samples(path, {"k": 1}) as ledger:
        ledger.append([LINE, LINE | {"sample": 1}])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"problem": "p", "sam')
    with open_samples(path, {"k": 1}) as ledger:
        assert ledger.records == {("p", 0): LINE, ("p", 1): LINE | {"sample": 1}}
        ledger.append([LINE | {"response": "another"}])  # is there already
    assert path.read_bytes() == whole
    path.write_bytes(whole + whole)
    with pytest.raises(DataError, match=r"lines.jsonl:3: the problem 'p', sample 0 stands there twice"):
        open_samples(path, {"k": 1})
    path.write_bytes(whole + b"[1]\n")
    with pytest.raises(DataError, match="lines.jsonl:3: not a line of this file"):
        open_samples(path, {"k": 1})


def test_a_ledger_belongs_to_its_settings(tmp_path):
    path = tmp_path / "lines.jsonl"
    with pytest.raises(ConfigError, match="there are no responses to score"):
        open_samples(path, None)
    open_samples(path, {"temperature": 0.3}).close()  # a model that did not start: nothing was sampled yet
    with open_samples(path, {"temperature": 0.6, "k": 1}) as ledger:
        ledger.append([LINE])
    with pytest.raises(ConfigError, match="was begun with temperature=0.6, now it is 1.0: restore it, or choose another run_dir"):
        open_samples(path, {"temperature": 1.0, "k": 1})
    with open_samples(path, None) as ledger:
        assert len(ledger.records) == 1 and read_settings(path) == {"temperature": 0.6, "k": 1}
    with open_samples(path, {"temperature": 1.0}, replace=True) as ledger:
        assert not ledger.records


def test_a_ledger_of_an_earlier_version_is_continued(tmp_path):
    """The two files byte for byte as they were written before both kinds of ledger became one class."""
    path = tmp_path / "responses.jsonl"
    line = '{"problem": "aime-1", "sample": 0, "response": "\\udcff 7", "finished": true, "tokens": 3}\n'
    path.write_text(line)
    settings = {"problems": "0f", "samples": 2, "temperature": 0.6, "seed": 0}
    path.with_suffix(".settings.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    with open_samples(path, settings) as ledger:
        assert ledger.records["aime-1", 0]["response"] == "\udcff 7"
        ledger.append([{"problem": "aime-1", "sample": 1, "response": "x", "finished": True, "tokens": 1}])
    assert path.read_text().startswith(line) and len(path.read_text().splitlines()) == 2
    with pytest.raises(ConfigError, match="was begun with samples=2, now it is 4"):
        open_samples(path, settings | {"samples": 4})
