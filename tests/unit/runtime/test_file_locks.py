"""A file system without locks says so, and a setting goes on without them."""

from __future__ import annotations

import errno
import fcntl
import os

import pytest

from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.errors import ConfigError
from megatron_r1.runtime.file_locks import use_locks
from megatron_r1.runtime.ledger import Ledger
from megatron_r1.runtime.run import Run

CONFIG = load_config(None, [])


@pytest.fixture(params=[errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def without_locks(request, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    monkeypatch.setattr(fcntl, "flock", refuse)
    yield
    use_locks(True)


def test_a_run_on_a_file_system_without_locks_says_so_and_a_switch_goes_on(without_locks, tmp_path):
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"run is on a file system without locks \(.*set runtime\.file_locks=false$"):
            Run.open(tmp_path / "run", CONFIG, "grpo")
    use_locks(False)
    with Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        assert run.step == 0


def test_so_does_a_file_that_grows(without_locks, tmp_path):
    with pytest.raises(ConfigError, match=r"l\.jsonl is on a file system without locks"):
        Ledger(tmp_path / "l.jsonl")
    use_locks(False)
    with Ledger(tmp_path / "l.jsonl") as ledger:
        ledger.append([{"id": "a"}])


def test_the_command_line_sets_the_switch(without_locks, tmp_path, capsys):
    command = ["curate", f"run_dir={tmp_path}", "curation.inputs=[none.jsonl]"]
    main([*command, "runtime.file_locks=false"])
    with Run.open(tmp_path / "run", CONFIG, "grpo"):
        pass
    main(command)
    with pytest.raises(ConfigError):
        Run.open(tmp_path / "run", CONFIG, "grpo")


def test_another_problem_of_a_lock_is_no_missing_lock(tmp_path, monkeypatch):
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OSError, match="Input/output error"):
        from megatron_r1.runtime.run_folder import lock_folder

        lock_folder(tmp_path)
