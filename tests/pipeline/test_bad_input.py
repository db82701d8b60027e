"""Bad input ends in one line on stderr and exit code 2, and leaves nothing that looks like a result."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

from megatron_r1 import cli
from megatron_r1.runtime import distributed
from tests.paths import ROOT
from tests.patience import patient

CONFIG = str(ROOT / "examples/tiny_cpu/r1_zero.yaml")
GSM8K = str(ROOT / "examples/gsm8k/grpo.yaml")


@pytest.fixture(autouse=True)
def one_command_per_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command is a process: forget where the ranks of the commands before met."""
    monkeypatch.setattr(distributed, "_STORE", None)


def complain(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command prints, after checking that it is one and that the exit code is 2."""
    capfd.readouterr()
    code = cli.main(list(arguments))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("megatron-r1")]
    assert code == 2 and len(lines) == 1, lines
    return lines[0]


def test_misspelt_key(capfd, tmp_path):
    line = complain(capfd, "grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", "grpo.clip_epss=0.3")
    assert "grpo.clip_epss" in line and "grpo.clip_eps" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "override, words",
    [
        ("parallel.tp=2", ["parallel.tp=2", "1 processes"]),
        ("parallel.pp=4", ["pp=4", "1 processes"]),
        ("parallel.etp=2", ["etp=2", "1 processes"]),
        ("grpo.minibatch_size=100", ["grpo.minibatch_size=100", "256"]),
        ("model.overrides.num_attention_heads=0", ["num_attention_heads"]),
        ("grpo.loss=gprpo", ["grpo.loss=gprpo", "package.module:function"]),
        ("rollout.top_p=0.9", ["rollout.top_p"]),
        ("parallel.cp=2", ["cp=2", "1 processes"]),
        ("model.preset=huge", ["huge", "tiny"]),
        ("runtime.device=cuda", ["cuda"]),
    ],
)
def test_what_does_not_fit(capfd, tmp_path, override, words):
    if override == "runtime.device=cuda":
        assert cli.main(["grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", override]) == 1
        line = capfd.readouterr().err
    else:
        line = complain(capfd, "grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", override)
    assert all(word in line for word in words), line


def test_missing_model_folder(capfd, tmp_path):
    line = complain(capfd, "grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", f"model.weights={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in line


def test_tokenizer_larger_than_the_model(capfd, tmp_path, finished_run):
    line = complain(
        capfd, "grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", f"data.tokenizer={finished_run / 'hf'}",
        "model.overrides.vocab_size=400",
    )  # fmt: skip
    assert "448" in line and "400" in line


def test_empty_prompt_file(capfd, tmp_path, finished_run):
    (tmp_path / "empty.jsonl").write_text("")
    line = complain(
        capfd, "grpo", "--config", GSM8K, f"run_dir={tmp_path / 'run'}", f"data.source={tmp_path / 'empty.jsonl'}",
        f"data.tokenizer={finished_run / 'hf'}",
    )  # fmt: skip
    assert "empty.jsonl" in line


def test_last_checkpoint_corrupt(capfd, tmp_path, finished_run, base, runs):
    """With an older one the run would go on (test_run.py, test_grpo_run.py); with none it must not start from zero unasked."""
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "hf")
    newest = folder / "checkpoints/step_000006"
    for checkpoint in (folder / "checkpoints").glob("step_*"):
        if checkpoint != newest:
            shutil.rmtree(checkpoint)
    victim = max(newest.rglob("*.distcp"), key=lambda p: p.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-100])
    capfd.readouterr()
    assert cli.main(["grpo", "--config", CONFIG, f"run_dir={folder}", f"model.weights={base / 'hf'}", *runs.SMALL]) == 2
    printed = capfd.readouterr().err.splitlines()
    (corrupt,) = [line for line in printed if line.startswith("corrupt checkpoint")]
    (error,) = [line for line in printed if line.startswith("megatron-r1")]
    assert victim.name in corrupt and "corrupt-step_000006" in corrupt
    assert "no intact checkpoint" in error and "corrupt-step_000006" in error
    assert not (folder / "hf").exists()


def test_changed_setting_of_a_started_run(capfd, tmp_path, finished_run, base, runs):
    folder = tmp_path / "run"
    shutil.copytree(finished_run, folder)
    shutil.rmtree(folder / "hf")
    line = complain(
        capfd, "grpo", "--config", CONFIG, f"run_dir={folder}", f"model.weights={base / 'hf'}", *runs.SMALL, "grpo.kl_coef=0.5"
    )
    assert "grpo.kl_coef" in line and "0.5" in line


def test_no_traceback_in_a_real_process(tmp_path):
    command = [sys.executable, "-m", "megatron_r1.cli", "evaluate", "--config", CONFIG, f"model.weights={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patient(120))
    assert done.returncode == 2 and "Traceback" not in done.stderr and "config.json" in done.stderr


def test_model_folder_with_a_lying_config(capfd, tmp_path, finished_run):
    folder = tmp_path / "model"
    shutil.copytree(finished_run / "hf", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 512}))
    line = complain(capfd, "grpo", "--config", CONFIG, f"run_dir={tmp_path / 'run'}", f"model.weights={folder}")
    assert "gate_proj" in line and "512" in line
