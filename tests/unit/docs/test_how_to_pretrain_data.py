"""docs/how_to/pretrain_data.md as written: its commands, the files that they make, and its options."""

from __future__ import annotations

import re
import runpy
import shlex
import sys

import pytest

from megatron_r1.cli import main
from tests.paths import ROOT
from tests.preprocess_runs import many_texts, write_lines

PAGE = (ROOT / "docs/how_to/pretrain_data.md").read_text(encoding="utf-8")


def test_the_commands_make_the_files_that_the_page_names(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus/a.txt").write_text("\n\n".join(many_texts(20)))
    write_lines(tmp_path / "corpus/b.jsonl", many_texts(20))
    train, preprocess = [shlex.split(block) for block in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)]
    monkeypatch.setattr(sys, "argv", train[1:])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / train[1]), run_name="__main__")
    assert preprocess[-2:] == ["--workers", "2"] and main(preprocess[1:-2]) == 0  # two processes are another test's
    made = sorted(path.name for path in tmp_path.glob("tokens*"))
    assert made == [f"tokens_text_document.{suffix}" for suffix in ("bin", "idx", "json")]
    with pytest.raises(SystemExit):
        main(["preprocess", "--help"])
    told = set(re.findall(r"--[a-z][a-z-]+", capsys.readouterr().out)) - {"--help"}
    assert told == set(re.findall(r"--[a-z][a-z-]+", PAGE)) - {"--out"}
