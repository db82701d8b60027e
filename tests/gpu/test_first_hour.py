"""The script of the first GPU hour, on the CPU: every part runs, a part that is killed loses nothing that it said, and the summary
says what happened."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.gpu import first_hour
from tests.gpu.hour.ground import Ground
from tests.paths import ROOT
from tests.patience import patient, slowness, wait_until

SCRIPT = ROOT / "tests/gpu/first_hour.py"


def test_every_part_runs_small(tmp_path: Path) -> None:
    """One command, in a plain checkout: no package is installed, and nothing is on the path but the script's folder."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, str(SCRIPT), "--cpu", "--out", str(tmp_path / "out"), "--stretch", str(2 * slowness())]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=patient(240), check=False
    )  # fmt: skip
    lines = first_hour.read_lines(tmp_path / "out/results.jsonl")
    ends = {line["part"]: line["end"] for line in lines if "end" in line}
    assert ends == dict.fromkeys(range(1, 11), "passed"), done.stderr[-3000:]
    assert done.returncode == 0
    assert [line for line in lines if line.get("ok") is False] == []
    for number in first_hour.PARTS:
        assert any(line.get("part") == number and "name" in line for line in lines), f"part {number} says nothing"
    summary = (tmp_path / "out/summary.md").read_text()
    assert all(f"| {number} | {part.shows} | passed |" in summary for number, part in first_hour.PARTS.items())


def says_and_hangs(ground: Ground) -> None:
    ground.say("before", 1.0, "s")
    Path(ground.folder, "child").write_text(str(os.getpid()))
    ground.start("tests.gpu.test_first_hour:hang").wait(600)


def hang(ground: Ground) -> None:
    Path(ground.folder, "grandchild").write_text(str(os.getpid()))
    time.sleep(600)


def fails_a_check(ground: Ground) -> None:
    ground.check("right", True)
    ground.check("wrong", False, "off by 1")


def breaks(ground: Ground) -> None:
    ground.attempt("kernel", lambda: 1 / 0)
    ground.say("before", "x")
    os._exit(7)


@pytest.fixture
def run_parts(monkeypatch, tmp_path: Path):
    def run(**targets: str) -> tuple[int, list[dict], str]:
        parts = {
            number: first_hour.Part("shows", target, 5.0, {}) for number, target in enumerate(targets.values(), 1)
        }  # fmt: skip
        monkeypatch.setattr(first_hour, "PARTS", parts)
        monkeypatch.setattr(first_hour, "_load_once", lambda: None)
        code = first_hour._run(parts, "cpu", tmp_path / "out", 100.0, tmp_path)
        return code, first_hour.read_lines(tmp_path / "out/results.jsonl"), (tmp_path / "out/summary.md").read_text()

    return run


def test_a_part_that_hangs_is_ended_with_its_processes_and_keeps_what_it_said(run_parts, tmp_path: Path) -> None:
    here = "tests.gpu.test_first_hour"
    code, lines, summary = run_parts(a=f"{here}:says_and_hangs", b=f"{here}:fails_a_check", c=f"{here}:breaks")
    assert code == 1
    said = [(line["part"], line["name"]) for line in lines if "name" in line]
    assert said == [(1, "before"), (2, "right"), (2, "wrong"), (3, "kernel"), (3, "before")]
    ends = [line["end"] for line in lines if "end" in line]
    assert ends == ["out of time", "failed (exit code 1)", "failed (exit code 7)"]
    assert "| wrong | **does not hold** off by 1 |" in summary and "ZeroDivisionError: division by zero" in summary
    for name in ("child", "grandchild"):
        wait_until(lambda name=name: _is_gone((tmp_path / "part_1" / name).read_text()), 30, f"the end of the {name}")


def test_a_line_that_a_killed_part_began_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"part": 1, "name": "a", "value": 1, "unit": ""}\n{"part": 1, "na')
    assert [line["name"] for line in first_hour.read_lines(tmp_path / "results.jsonl")] == ["a"]


def test_missing_packages_are_named_and_leave_out_only_the_parts_that_need_them(monkeypatch, tmp_path: Path, capsys) -> None:
    monkeypatch.setattr(first_hour, "_is_there", lambda module: module not in ("pydantic", "megatron.core"))
    last = first_hour.Part("shows", first_hour.PARTS[10].target, 20.0, first_hour.TORCH)
    monkeypatch.setattr(first_hour, "PARTS", {1: first_hour.PARTS[1], 10: last})
    assert first_hour._run(first_hour.PARTS, "cpu", tmp_path / "out", 100.0, tmp_path) == 1
    ends = {line["part"]: line["end"] for line in first_hour.read_lines(tmp_path / "out/results.jsonl") if "end" in line}
    assert ends[1].startswith("left out: needs megatron-core, pydantic, ") and ends[10] == "passed"
    assert "missing: megatron-core\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"), [(["--parts", "1,11"], "the parts are 1, 2,"), (["--parts", "x"], "the parts are 1, 2,")]
)
def test_wrong_parts_are_one_line(capsys, tmp_path: Path, arguments, says) -> None:
    with pytest.raises(SystemExit) as stop:
        first_hour.main(["--cpu", "--out", str(tmp_path), *arguments])
    assert stop.value.code == 2 and says in capsys.readouterr().err
    with pytest.raises(SystemExit):
        first_hour.main(["--cpu"])
    assert "--out DIR is missing" in capsys.readouterr().err


def test_a_fresh_process_as_on_a_gpu_ends_the_same_way(tmp_path: Path) -> None:
    ground = Ground(2, "cuda", str(tmp_path / "results.jsonl"), str(tmp_path))  # its targets here touch no device
    here = "tests.gpu.test_first_hour"
    failing, breaking, hanging = (ground.start(f"{here}:{name}") for name in ("fails_a_check", "breaks", "says_and_hangs"))
    assert failing.wait(patient(30)) == 1 and breaking.wait(patient(30)) == 7
    wait_until((tmp_path / "grandchild").exists, 30, "the process of the part that hangs")
    assert hanging.wait(0.1) is None
    names = [line["name"] for line in first_hour.read_lines(tmp_path / "results.jsonl")]
    assert sorted(names) == ["before", "before", "kernel", "right", "wrong"]
    wait_until(lambda: _is_gone((tmp_path / "grandchild").read_text()), 30, "the end of that process")


def _is_gone(process: str) -> bool:
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().split()[2] == "Z"  # killed, and not collected by its own parent
