"""The command of docs/how_to/loss.md: a user's own loss trains, on one process and the same on two."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.paths import ROOT
from tests.patience import patient

PAGE = (ROOT / "docs" / "how_to" / "loss.md").read_text(encoding="utf-8")


def test_the_how_tos_loss_trains(base: Path, runs, tmp_path: Path) -> None:
    (tmp_path / "own_losses.py").write_text(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)[0], encoding="utf-8")
    (block,) = (block for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) if "megatron-r1 grpo" in block)
    path, program, command, *settings = shlex.split(block.replace("\\\n", " "))
    assert (path, program, command) == ("PYTHONPATH=.", "megatron-r1", "grpo")
    (loss,) = (setting for setting in settings if setting.startswith("grpo.loss="))
    lines = {}
    for processes in (1, 2):
        folder = tmp_path / f"run{processes}"
        line = runs.grpo_command(folder, base, "grpo.rollouts=2", "evaluate.interval=2", loss, processes=processes)
        search = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
        done = subprocess.run(
            line,
            check=False,
            cwd=ROOT,
            env=dict(os.environ, OMP_NUM_THREADS="1", PYTHONPATH=search),
            capture_output=True,
            text=True,
            timeout=patient(400),
        )
        assert done.returncode == 0, done.stderr[-3000:]
        lines[processes] = runs.read_metrics(folder)[1:]
    assert len(lines[1]) == 2 and lines[1][1]["drift/max"] > 0 and lines[1][1]["grad_norm"] > 0
    for key in ("loss", "grad_norm", "drift/max", "drift/dropped"):
        assert lines[2][0][key] == pytest.approx(lines[1][0][key], rel=1e-3, abs=1e-6), key
