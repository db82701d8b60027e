"""A checkpoint counts from the moment when all its files are written, whatever becomes of the run."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap

import pytest

from megatron_r1.config.load import load_config
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
