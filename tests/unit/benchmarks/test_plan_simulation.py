"""The comparison of predicted rounds with recorded ones, on runs whose rates are known."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks import round_clocks
from benchmarks.plan_simulation import CASES, by_processor_clock, config_of, main, measure_run
from benchmarks.processes import CommandFailed
from benchmarks.round_clocks import run_by_processor_clock
from megatron_r1.config.load import load_config
from megatron_r1.pipeline.stages.grpo import check_grpo
from tests.simulated_runs import SETUP, write_run

DISPATCH = {"processor": "fixed", "wall": "queue"}  # a queue is emptied by the wall clock


def make(tmp_path: Path, rounds: int) -> Path:
    run = tmp_path / "run"
    write_run(run, SETUP, rounds)
    (run / "config.yaml").write_text(yaml.safe_dump({"rollout": {"max_num_seqs": 8, "dispatch": "fixed"}}))
    return run


@pytest.mark.parametrize("clock", ("processor", "wall"))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_runs_are_what_the_cases_say(case, clock: str, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config_of(case, tmp_path / "run", tmp_path, 7, 0, clock)))
    config = load_config(tmp_path / "config.yaml")
    check_grpo(config)
    assert (config.rollout.max_num_seqs, config.grpo.rollouts, config.rollout.dispatch) == (case.max_num_seqs, 7, DISPATCH[clock])
    assert config.rollout.engines_per_node == case.engines and (config.rollout.placement == "colocated") == (case.engines > 1)


def test_a_round_by_the_processors_clock_is_that_of_the_last_engine_and_the_trainer() -> None:
    of = by_processor_clock(3, [np.array([4, 5])], {"engine": [2.0, 6.0], "trainer": [3.0, 1.0]})
    assert (of.seconds["rollout"], of.seconds["train"], of.total, of.tokens, of.step) == (6.0, 3.0, 9.0, 9, 3)
    assert of.idle == pytest.approx((6 - 2) / 12)


RECORDING = """
import json, pathlib, sys, time
if sys.argv[1:] == ["die"]:
    raise SystemExit("error: it died")
for step in range(4):
    with open("metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step}) + "\\n")
    while not pathlib.Path(f"seen_{step}").exists():
        time.sleep(0.01)
"""


def test_clocks_are_read_as_steps_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clocks = [10.0, 11.0, 14.0, 14.5]

    def read_clock(pid: int) -> float:
        seen = len(list(tmp_path.glob("seen_*")))
        (tmp_path / f"seen_{seen}").touch()
        return clocks[seen]

    (tmp_path / "recording.py").write_text(RECORDING)
    monkeypatch.setattr(round_clocks, "ROOT", tmp_path)
    monkeypatch.setattr(round_clocks, "cpu_seconds", read_clock)
    monkeypatch.setattr(round_clocks, "_KINDS", {"engine": "nothing", "trainer": "recording"})
    found = run_by_processor_clock([sys.executable, "-m", "recording"], tmp_path)
    assert found == {step: {"engine": [], "trainer": [seconds]} for step, seconds in ((1, 1.0), (2, 3.0), (3, 0.5))}
    with pytest.raises(CommandFailed, match="it died"):
        run_by_processor_clock([sys.executable, "-m", "recording", "die"], tmp_path / "none")


def test_rates_are_fitted_on_some_cases_alone() -> None:
    assert [case.is_fitted for case in CASES] == [True, True, False, False]
    fitted = {case.max_num_seqs for case in CASES if case.is_fitted and case.engines == 1}
    assert len(fitted) == 2 and any(case.max_num_seqs not in fitted for case in CASES)


def test_the_rounds_of_a_simulated_run_are_predicted(tmp_path: Path, capsys) -> None:
    run, out = make(tmp_path, 9), tmp_path / "found.json"
    assert main(["--run", str(run), "--engines", "2", "--out", str(out)]) == 0
    outcomes = json.loads(out.read_text())["outcomes"]
    assert [len(of["measured"]) for of in outcomes] == [4, 4]
    for of in outcomes:
        assert of["predicted"] == pytest.approx(of["measured"], rel=1e-6)
        assert of["idle_predicted"] == pytest.approx(of["idle_measured"], rel=1e-6) and max(of["idle_measured"]) > 0.1
    assert "even rounds, held out" in capsys.readouterr().out


@pytest.mark.parametrize("spoilt", ("seconds/rollout", "rollout/idle"))
def test_rounds_that_were_otherwise_do_not_hold(tmp_path: Path, spoilt: str) -> None:
    run = make(tmp_path, 9)
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in records[1:]:
        if record["step"] % 2 == 0:  # these are held out
            record[spoilt] = record[spoilt] * 1.6 + 0.06
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    fitted, held_out = measure_run(run, 2)
    assert fitted.holds and not held_out.holds and not replace(held_out, predicted=[9e9] * 4).holds
    assert replace(fitted, was_fitted=False, whole=False, predicted=[9e9] * 4).holds
    assert main(["--run", str(run), "--engines", "2"]) == 1


def test_a_run_that_is_too_short_is_one_line(tmp_path: Path, capsys) -> None:
    assert main(["--run", str(make(tmp_path, 3))]) == 2
    assert "five are needed" in capsys.readouterr().err
    assert main(["--cases", "9"]) == 2
