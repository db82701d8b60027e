"""docs/how_to/stage.md, followed as it is written in a copy of the package: a stage, its command and its step of the recipe."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_r1.pipeline.artifact import Artifact
from tests.paths import ROOT
from tests.patience import patient

PAGE = ROOT / "docs/how_to/stage.md"
STEP = """
from pathlib import Path
from megatron_r1.config.load import load_config
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.recipe.stages import STAGES
from megatron_r1.pipeline.session import open_session

config = load_config(Path("weighted.yaml"), ["recipe.stages.student_weighted.weighted.steps=2"])
with open_session(config.runtime) as session:
    STAGES["student_weighted"].run(Recipe(config), session)
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def write_file(folder: Path, block: str) -> None:
    """A block whose first line is the name of a new file."""
    path = folder / block.partition("\n")[0].removeprefix("# ")
    assert not path.exists(), f"{path} is there already"
    path.write_text(block.partition("\n")[2], encoding="utf-8")


def apply_edit(folder: Path, block: str) -> None:
    """A block whose first line is the name of a file, and whose others are hunks: lines of the file, and new ones with a +."""
    name, _, hunks = block.partition("\n")
    path = folder / name.removeprefix("# ")
    for hunk in hunks.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        old = "".join(line[1:] for line in lines if not line.startswith("+"))
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has no longer, or more than once:\n{old}"
        path.write_text(text.replace(old, "".join(line[1:] for line in lines)), encoding="utf-8")


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the package, the tools and what the page adds, in which the page's commands have run."""
    folder = tmp_path_factory.mktemp("how_to")
    for name in ("megatron_r1", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for block in [*blocks("python"), *blocks("yaml")]:
        write_file(folder, block)
    for block in blocks("diff"):
        apply_edit(folder, block)
    (folder / "responses.jsonl").write_text(blocks("json")[0], encoding="utf-8")
    command = folder / "bin/megatron-r1"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m megatron_r1.cli "$@"\n')
    command.chmod(0o755)
    (folder / "out.txt").write_text("".join(run(folder, "sh", "-ec", block) for block in blocks("bash")))
    return folder


def run(folder: Path, *command: str) -> str:
    """What a command in the folder prints, with the folder's package and command before the installed ones."""
    paths = {"PYTHONPATH": str(folder), "PATH": f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(
        command, cwd=folder, env=os.environ | paths, capture_output=True, text=True, timeout=patient(600), check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_stage_learns_what_scored_well_and_leaves_a_sealed_model(followed):
    scores = [json.loads(line)["score"] for line in (followed / "scored.jsonl").read_text().splitlines()]
    assert scores == [1.0, 1.0, 0.0]
    losses = [json.loads(line)["loss"] for line in (followed / "runs/weighted/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 20 and losses[-1] < losses[0] / 2
    Artifact(followed / "runs/weighted/hf").verify()
    assert json.loads((followed / "runs/weighted/hf/artifact.json").read_text())["stage"] == "weighted"


def test_its_command_shows_its_settings_and_skips_what_is_finished(followed):
    assert "Scored responses of one update" in run(followed, "megatron-r1", "weighted", "--help")
    again = run(followed, "sh", "-ec", blocks("bash")[0].splitlines()[-1])
    assert "runs/weighted/hf is finished" in again


def test_its_step_of_the_recipe_is_planned_and_runs(followed):
    plan = (followed / "out.txt").read_text().splitlines()[-2:]
    assert [line.split()[:3] for line in plan] == [["student", "finished", "student's"], ["student_weighted", "to", "do"]]
    run(followed, sys.executable, "-c", STEP)
    manifest = json.loads((followed / "runs/recipe/student_weighted/hf/artifact.json").read_text())
    assert manifest["stage"] == "weighted" and manifest["inputs"]["model.weights"]["path"] == "runs/weighted/hf"
