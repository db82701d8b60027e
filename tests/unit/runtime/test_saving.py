"""A checkpoint counts from the moment when all its files are written, whatever becomes of the run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from functools import partial

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.errors import DataError, NonFiniteUpdate
from megatron_r1.runtime import saving
from megatron_r1.runtime.background import ForkedWork
from megatron_r1.runtime.checkpoints import complete_checkpoints
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.saving import Unwritten
from tests.patience import patient, wait_until

CONFIG = load_config(None, [])


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_checkpoint_counts_once_it_is_written_whatever_the_next_step_does(tmp_path, error):
    with pytest.raises(error), Run.open(tmp_path, CONFIG, "grpo") as run:
        for step in run.steps(9, "grpo"):
            run.record(step, {"loss": 1.0})
            if step == 1:
                run.checkpoint(step, lambda _: Unwritten((), lambda: None, lambda _: None), {"cursor": step})
            else:
                wait_until(lambda: complete_checkpoints(tmp_path / "checkpoints"), 20, "seal, which waits for no step")
                raise error
    with Run.open(tmp_path, CONFIG, "grpo") as run:
        assert (run.step, run.state) == (1, {"cursor": 1})


def write_slowly(folder):
    def write():
        time.sleep(0.3)
        (folder / "late.bin").write_bytes(b"all of it")

    return Unwritten(["late.bin"], write, lambda _: None)


@pytest.mark.parametrize("error", [NonFiniteUpdate("no more"), KeyboardInterrupt(), DataError("in an evaluation"), SystemExit(1)])
def test_a_run_that_fails_finishes_the_checkpoint_that_it_is_writing(tmp_path, capsys, error):
    with pytest.raises(type(error)), Run.open(tmp_path, CONFIG, "grpo") as run:
        for step in run.steps(9, "grpo"):
            if step == 2:
                raise error
            run.record(step, {"loss": 1.0})
            run.checkpoint(step, write_slowly, {"cursor": step})
    assert run.step == 1
    assert "the checkpoint of step 1 is written; Ctrl-C gives it up" in capsys.readouterr().err
    with Run.open(tmp_path, CONFIG, "grpo") as run:
        assert (run.step, run.state) == (1, {"cursor": 1})
        assert (run.resumed_from / "late.bin").read_bytes() == b"all of it"


def test_ctrl_c_while_a_checkpoint_is_waited_for_does_not_drop_it(tmp_path):
    with pytest.raises(KeyboardInterrupt), Run.open(tmp_path, CONFIG, "grpo") as run:
        for step in run.steps(9, "grpo"):
            if step == 2:
                threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGINT)).start()
            run.checkpoint(step, write_slowly, {})  # the second one waits for the first
    assert complete_checkpoints(tmp_path / "checkpoints")[0].name == "step_000001"


def test_a_writer_that_fails_after_the_run_does_not_hide_the_runs_error(tmp_path):
    def fail():
        time.sleep(0.2)
        raise OSError(28, "No space left on device")

    with pytest.raises(NonFiniteUpdate), Run.open(tmp_path, CONFIG, "grpo") as run:
        for step in run.steps(9, "grpo"):
            run.checkpoint(step, lambda _: Unwritten((), fail, lambda _: None), {})
            raise NonFiniteUpdate("no more")
    assert complete_checkpoints(tmp_path / "checkpoints") == []


def test_rank_zero_does_not_wait_for_ranks_that_are_gone(tmp_path, monkeypatch):
    """Two ranks, of which the other never leaves its note."""
    monkeypatch.setattr(saving, "_WAIT_FOR_OTHERS", 0.3)
    pending = saving.PendingCheckpoint(tmp_path, 1, lambda _: None, {}, asynchronous=False)
    places = (pending._temporary, pending._final, pending._notes, 1, 0, 2)
    pending._fork = ForkedWork(partial(saving._write_beside_training, saving._NOTHING, *places))
    assert pending.finish() is False
    assert complete_checkpoints(tmp_path) == []


SEALER = """
    import sys, time
    from pathlib import Path
    from megatron_r1.config.load import load_config
    from megatron_r1.runtime.run import Run
    from megatron_r1.runtime.saving import Unwritten

    def save(folder):
        def seal_slowly(results):
            (folder / "sealing").touch()
            time.sleep(0.7)
        return Unwritten((), lambda: None, seal_slowly)

    with Run.open(Path(sys.argv[1]), load_config(None, []), "grpo") as run:
        for step in run.steps(9, "grpo"):
            run.record(step, {"loss": 1.0})
            if step == 1:
                run.checkpoint(step, save, {})
            else:
                time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_run_that_is_killed_while_a_written_checkpoint_is_sealed_keeps_it(tmp_path, number):
    script, folder = tmp_path / "worker.py", tmp_path / "run"
    script.write_text(textwrap.dedent(SEALER))
    process = subprocess.Popen([sys.executable, str(script), str(folder)], stderr=subprocess.DEVNULL)
    wait_until(lambda: (folder / "checkpoints" / ".tmp-step_000001" / "sealing").exists(), 60, "start of sealing")
    process.send_signal(number)
    assert process.wait(timeout=patient(30)) != 0
    wait_until(lambda: complete_checkpoints(folder / "checkpoints"), 20, "seal after the kill")
    with Run.open(folder, CONFIG, "grpo") as run:
        assert run.step == 1
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000001"]
