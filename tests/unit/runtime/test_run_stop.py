"""A run that is asked to stop saves after its step and leaves; what a batch script and `megatron-r1 status` learn of it."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import time

import pytest

from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.errors import CheckpointError, DataError, StopRequested
from megatron_r1.report.status import describe_status
from megatron_r1.runtime import rollout_files
from megatron_r1.runtime.heartbeat import FOLDER, read_sign, sign_path
from megatron_r1.runtime.job import record_outcome
from megatron_r1.runtime.metrics import MetricsWriter, read_metrics
from megatron_r1.runtime.run import Run
from megatron_r1.runtime.stragglers import straggler_metrics
from tests.patience import wait_until

CONFIG = load_config(None, ["checkpoint.interval=100"])


def write_weights(folder):
    (folder / "weights.bin").write_bytes(b"w")


def train(folder, steps, stop_at=None):
    with Run.open(folder, CONFIG, "grpo") as run:
        for step in run.steps(steps, "grpo"):
            with run.timer("rollout"):
                time.sleep(0.01)
            run.count_tokens("rollout", 100)
            if step == stop_at:
                signal.raise_signal(signal.SIGUSR1)
            run.record(step, {"loss": 1 / step})
            if run.checkpoint_due(step, steps):
                run.checkpoint(step, write_weights, {"cursor": step})


def test_a_signal_has_the_run_saved_and_left_and_the_same_command_goes_on(tmp_path, monkeypatch):
    monkeypatch.setenv("MEGATRON_R1_JOB", str(tmp_path))
    folder = tmp_path / "run"
    with pytest.raises(
        StopRequested, match="SIGUSR1: stopped after step 3 of 9, which is saved; the same command resumes"
    ) as stopped:
        train(folder, 9, stop_at=3)
    assert stopped.value.exit_code == 75
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
    assert (tmp_path / "progress").read_text() == f"{folder} 3\n"
    train(folder, 9)
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == list(range(1, 10))


def test_a_signal_in_the_last_step_ends_nothing(tmp_path):
    from megatron_r1.runtime import interrupt

    train(tmp_path / "run", 2, stop_at=2)
    assert interrupt.forget() == "SIGUSR1"


def test_the_first_word_about_a_jobs_end_counts(tmp_path, monkeypatch):
    record_outcome("finished")  # no folder of a job: nothing happens
    monkeypatch.setenv("MEGATRON_R1_JOB", str(tmp_path))
    assert main(["pretrain", "model.presets=tiny"]) == 2
    record_outcome("finished")
    outcome, why = (tmp_path / "outcome").read_text().splitlines()
    assert outcome == "failed" and "unknown key 'model.presets'" in why


@pytest.mark.parametrize("what", ["metrics", "rollouts"])
def test_a_disk_that_fills_outside_of_a_save_is_one_line_at_the_end_of_the_step(tmp_path, monkeypatch, what):
    def fill(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("MEGATRON_R1_JOB", str(tmp_path))
    message = f"{tmp_path / 'run'} cannot be written: No space left on device; the same command resumes when it can be"
    with pytest.raises(CheckpointError, match=message), Run.open(tmp_path / "run", CONFIG, "grpo") as run:
        monkeypatch.setattr(*((MetricsWriter, "write") if what == "metrics" else (rollout_files, "write_atomically")), fill)
        for step in run.steps(3, "grpo"):
            run.save_rollouts(step, [])
            run.record(step, {"loss": 1.0})
            run.checkpoint_due(step, 3)
            assert step == 0, "the first step's end tells"
    assert (tmp_path / "outcome").read_text() == f"failed\n{message}\n"


def test_status_tells_a_run_from_its_folder(tmp_path):
    folder = tmp_path / "run"
    with pytest.raises(DataError, match="holds no run"):
        describe_status(folder)
    config = load_config(None, ["checkpoint.interval=100", "runtime.heartbeat.interval_seconds=0.1"])
    with Run.open(folder, config, "grpo") as run:
        for step in run.steps(8, "grpo"):
            with run.timer("rollout"):
                time.sleep(0.01)
            run.count_tokens("rollout", 100)
            run.record(
                step,
                {"loss": 1 / step, "seconds/ranks/slowest": 5, "seconds/ranks/probe_max": 0.5, "seconds/ranks/probe_median": 0.1},
            )
            run.checkpoint(step, write_weights, {})
            if step == 4:
                break
        wait_until(lambda: read_sign(sign_path(folder / FOLDER, 0)).step == 4, 20, "next sign of life")
        text = describe_status(folder)
        assert f"{folder}: grpo, running, begun 20" in text
        assert (
            "step        4 of 8 (50%)" in text and "s a step" in text and "rollout tokens/s" in text and "ends        about" in text
        )
        assert re.search(r"checkpoint  step [34], \d+ s ago", text)
        assert "nodes       1 of 1 well, 1 of 1 ranks seen" in text and "slowest     rank 5: 0.5 s for the probe" in text
        late = describe_status(folder, now=time.time() + 3600)
        assert "not running" in late
    assert "not running" in describe_status(folder)
    (folder / FOLDER / "abort.json").write_text(json.dumps({"why": "rank 3 gave no sign"}))
    assert "stopped: a rank hung" in describe_status(tmp_path) and "hung        rank 3 gave no sign" in describe_status(tmp_path)
    assert main(["status", str(folder)]) == 0


def test_the_slowest_rank_is_named():
    described = straggler_metrics([0.1, 0.4, 0.1], [1.0, 2.0, 3.0])
    assert described["seconds/ranks/slowest"] == 1 and described["seconds/ranks/probe_median"] == 0.1
    assert described["seconds/ranks/cpu_max"] == 3.0


def test_no_thread_and_no_handler_is_left(tmp_path):
    train(tmp_path / "run", 1)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert not [name for name in os.listdir(tmp_path / "run" / FOLDER) if name.startswith("stacks_")]
