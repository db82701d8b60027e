"""Who may write into a run folder, and which settings a run that goes on must keep."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron_r1.config.load import load_config
from megatron_r1.errors import CheckpointError, ConfigError
from megatron_r1.runtime.run import Run

CONFIG = load_config(None, ["checkpoint.interval=2"])


def begin(folder: Path) -> None:
    """A run of one step, which is saved."""
    with Run.open(folder, CONFIG, "grpo") as run:
        for step in run.steps(1, "grpo"):
            run.record(step, {"loss": 1.0})
            if run.checkpoint_due(step, 1):
                run.checkpoint(step, lambda _: None, {})


def test_a_changed_setting_is_refused_and_named(tmp_path):
    begin(tmp_path / "run")
    changed = load_config(None, ["checkpoint.interval=2", "grpo.kl_coef=0.5"])
    with pytest.raises(ConfigError, match=r"grpo\.kl_coef=0\.001, now it is 0\.5"):
        Run.open(tmp_path / "run", changed, "grpo")
    with pytest.raises(ConfigError, match="holds a run of 'grpo', not of 'sft'"):
        Run.open(tmp_path / "run", CONFIG, "sft")
    free = load_config(
        None, ["checkpoint.interval=5", "checkpoint.keep=1", "runtime.threads=2", "run_dir=elsewhere", "parallel.tp=2"]
    )
    with Run.open(tmp_path / "run", free, "grpo") as run:
        assert run.step == 1
    assert load_config(tmp_path / "run" / "config.yaml") == free


def test_a_run_that_stopped_before_its_first_step_takes_other_settings(tmp_path):
    Run.open(tmp_path, CONFIG, "grpo").close()
    changed = CONFIG.model_copy(update={"seed": CONFIG.seed + 1})
    with Run.open(tmp_path, changed, "pretrain"):
        assert load_config(tmp_path / "config.yaml").seed == changed.seed


def test_a_second_writer_is_refused_until_the_first_ends(tmp_path):
    with Run.open(tmp_path / "run", CONFIG, "grpo"), pytest.raises(ConfigError, match=f"process {os.getpid()} on"):
        Run.open(tmp_path / "run", CONFIG, "grpo")
    Run.open(tmp_path / "run", CONFIG, "grpo").close()


def test_a_run_dir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(ConfigError, match="run_dir .*run cannot be written"):
        Run.open(tmp_path / "run", CONFIG, "grpo")


def test_a_damaged_note_of_the_command_is_named_and_the_folder_left_free(tmp_path):
    begin(tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text("{}")
    for _ in range(2):  # the second time, too: the first must not keep the lock
        with pytest.raises(CheckpointError, match=r"run\.json does not name the command"):
            Run.open(tmp_path / "run", CONFIG, "grpo")
