"""A dry run asks the planner: what does not fit is one line, a warning, or not looked at."""

from __future__ import annotations

import pytest

from megatron_r1 import cli
from tests.paths import ROOT

ZERO = ["grpo", "--dry-run", "--config", str(ROOT / "examples/v3_671b/r1_zero.yaml"), "--world-size", "512"]
KEPT = "runtime.recompute=none"


def run(capsys, *settings: str) -> tuple[int, str, str]:
    code = cli.main([*ZERO, *settings])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_peak_of_every_phase_is_told(capsys) -> None:
    code, out, err = run(capsys)
    assert code == 0 and not err
    assert "room        H800 of 85.5 GB: sampling 76.4, log-probs" in out and "node of 2,000 GB: saving" in out
    assert "an engine's cache holds 9 responses of the longest kind" in out, "of 65,536 tokens"
    _, out, _ = run(capsys, "--gpu", "H200")
    assert "H200 of 150.8 GB: sampling" in out


def test_enforced_it_is_one_line_and_exit_code_2(capsys) -> None:
    code, out, err = run(capsys, KEPT)
    assert (code, out) == (2, "") and err.count("\n") == 1
    assert err.startswith("megatron-r1: error: grpo does not fit: update, from update 8,200 needs ") and KEPT.split("=")[0] in err


@pytest.mark.parametrize(("choice", "told"), [("warn", "grpo does not fit: update"), ("off", "")])
def test_warned_of_or_not_looked_at_it_goes_on(choice: str, told: str, capsys) -> None:
    code, out, err = run(capsys, KEPT, f"runtime.plan={choice}")
    assert code == 0 and err.startswith(told) and err.count("\n") == bool(told)
    assert ("memory is not looked at: runtime.plan=off" in out) == (choice == "off")


def test_a_recipe_names_the_stage(capsys) -> None:
    recipe = ["pipeline", "r1", "--config", str(ROOT / "examples/v3_671b/r1.yaml"), "--dry-run", "--world-size", "512"]
    settings = ["model.weights=/nowhere", "recipe.stages.student.model.weights=/nowhere", "--from", "stage2", "--to", "stage2"]
    assert cli.main([*recipe, *settings, KEPT]) == 2
    assert capsys.readouterr().err.startswith("megatron-r1: error: stage stage2: grpo does not fit: update needs")


def test_bad_input_is_one_line(capsys) -> None:
    code, out, err = run(capsys, "--gpu", "H900")
    assert (code, out) == (2, "") and "--gpu H900: there is no such device in the table" in err and err.count("\n") == 1
    assert cli.main([*ZERO[:1], "--config", ZERO[3], "--gpu", "H800"]) == 2
    assert "--gpu says what a dry run is to look at" in capsys.readouterr().err


def test_on_cpus_it_is_the_machine_that_must_have_room(capsys, monkeypatch) -> None:
    tiny = ["grpo", "--dry-run", "--config", str(ROOT / "examples/tiny_cpu/r1_zero.yaml")]
    for room, code in ((8 * 10**9, 0), (10**9, 2)):
        monkeypatch.setattr("megatron_r1.plan.memory_cpu.machine_bytes", lambda room=room: room)
        assert cli.main(tiny) == code
        told = capsys.readouterr()
        assert ("room        this machine of 8.0 GB: sampling 1." in told.out) == (code == 0)
        assert told.err.startswith("megatron-r1: error: grpo does not fit: ") == (code == 2)
    assert cli.main([*tiny, "runtime.plan=warn"]) == 0
    assert capsys.readouterr().err.startswith("grpo does not fit: ")
