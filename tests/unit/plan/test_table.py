"""The printed plan: a column for every phase, the commands of the how-to as written, and records for programs."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from megatron_r1 import cli
from tests.paths import ROOT

PAGE = (ROOT / "docs/how_to/plan.md").read_text(encoding="utf-8")
COMMANDS = [shlex.split(line)[1:] for line in PAGE.splitlines() if line.startswith("    megatron-r1 plan --stage")]


@pytest.mark.parametrize(
    ("command", "code"), zip(COMMANDS, (0, 2, 0, 0), strict=True), ids=("fits", "does not", "on eight", "times")
)
def test_the_how_to_is_right(command: list[str], code: int, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert cli.main(command) == code
    told = capsys.readouterr()
    stage = command[command.index("--stage") + 1]
    assert told.out.startswith(f"plan of {stage}: ")
    lines = told.out.splitlines()
    head = next(line for line in lines if "update" in line)
    totals = [line.split() for line in lines if line.startswith(("in all ", "left "))]
    assert len(totals) == 4 and {len(words) - words.count("all") for words in totals} == {len(totals[1])}
    assert ("sampling" in head) == (stage == "grpo")
    if code:
        assert re.fullmatch(r"megatron-r1: error: sft does not fit: update needs [\d.]+ GB of a device, .*\n", told.err), told.err
        assert "does not fit: update needs" in told.out
    else:
        assert "fits" in lines and not told.err
        assert any(line.startswith("time of a") for line in lines) and "GPU-hours" in told.out


def test_the_how_to_names_every_row() -> None:
    for row in ("weights", "dispatch to experts", "imbalance of experts", "layer that is computed", "checkpoint", "fragmentation"):
        assert row in PAGE


def test_programs_get_bytes(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "plan.json"
    assert cli.main([*COMMANDS[0], "--json", str(out)]) == 0
    capsys.readouterr()
    found = json.loads(out.read_text())
    assert (found["stage"], found["device"], found["ranks"], found["fits"]) == ("grpo", "H800", 512, True)
    for phase in found["memory"]:
        assert abs(phase["device_bytes"] - sum(term["bytes"] for term in phase["device"])) < 100
        assert abs(phase["host_bytes"] - sum(term["bytes"] for term in phase["host"])) < 100
    assert "runtime.offload" in {term["setting"] for phase in found["memory"] for term in phase["host"]}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "H900"], "--gpu H900: there is no such device in the table; it has A100"),
        (["--nodes", "0"], "'0' is no whole number from 1 to 100,000"),
        (["--imbalance", "0.5"], "'0.5' is no number from 1 to 100,000"),
        (["parallel.tp=3"], "parallel.tp=3 does not divide"),
        (["--stage", "tuning"], "invalid choice: 'tuning'"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, capsys) -> None:
    try:
        code = cli.main(["plan", *arguments])
    except SystemExit as ended:
        code = ended.code
    told = capsys.readouterr()
    assert code == 2 and said in told.err and told.err.count("\n") == 1 and not told.out


def test_a_model_folder_without_config_is_one_line(tmp_path: Path, capsys) -> None:
    assert cli.main(["plan", "--stage", "sft", f"model.weights={tmp_path}"]) == 2
    told = capsys.readouterr()
    assert "config.json" in told.err and told.err.count("\n") == 1
