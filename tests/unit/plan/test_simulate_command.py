"""`megatron-r1 plan simulate`: the table, what it takes from a run, and its errors."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from megatron_r1.cli import main
from tests.paths import ROOT
from tests.simulated_runs import SETUP, write_run

ROUND = ["grpo.prompts_per_rollout=16", "grpo.group_size=4", "rollout.max_num_seqs=16", "rollout.max_response_tokens=2000"]
RATES = [
    "--decode", "1:0.02,16:0.03", "--context-seconds", "1e-7", "--prefill-tokens-per-second", "5000", "--prompt-tokens", "100",
    "--logprob-tokens-per-second", "20000", "--train-tokens-per-second", "8000", "--sync-seconds", "2", "--scorers", "4",
    "--score-seconds", "0.1", "--cache-tokens", "9000",
]  # fmt: skip


def simulate(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", "simulate", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def figures(out: str, row: str) -> list[float]:
    (line,) = (line for line in out.splitlines() if line.strip().startswith(row))
    return [float(cell.rstrip("%").replace(",", "")) for cell in line.removeprefix(line[: line.index(row)] + row).split()]


def test_engines_of_their_own_are_played_in_all_ways(capsys, tmp_path: Path) -> None:
    where = tmp_path / "rounds.json"
    lengths = ["--lengths", "lognormal:300,1.0,0.3", "--engines", "4", "--rounds", "6", "--json", str(where)]
    code, out, err = simulate(capsys, *RATES, *lengths, "--oversampling", "1.5", "rollout.placement=disaggregated", *ROUND)
    assert (code, err) == (0, "")
    header = next(line for line in out.splitlines() if "synchronous" in line)
    assert header.split("  ")[-1].strip() == "one step off, partial 1.5" and header.index("one step off") > header.index(
        "synchronous"
    )
    staleness = figures(out, "staleness of samples, most rounds")
    assert staleness[:2] == [0, 1] and len(staleness) == 4
    seconds = figures(out, "round, seconds")
    assert seconds[1] < seconds[0]  # sampling and training beside each other
    written = json.loads(where.read_text())
    assert list(written["rounds"]) == ["synchronous", "one step off", "synchronous, partial 1.5", "one step off, partial 1.5"]
    of = written["rounds"]["synchronous"][1:]
    assert sum(r["end"] - r["begin"] for r in of) / 5 == pytest.approx(seconds[0], rel=1e-2)
    assert simulate(capsys, *RATES, *lengths, "--oversampling", "1.5", "rollout.placement=disaggregated", *ROUND)[1] == out


def test_engines_beside_the_trainer_have_no_step_off(capsys) -> None:
    code, out, _ = simulate(capsys, *RATES, "--lengths", "equal:100", *ROUND)
    assert code == 0 and "One step off is left out" in out and "16 prompts x 4 responses a round, 100 tokens each" in out
    # Nothing runs while the responses of the last four groups are scored, four at a time.
    assert figures(out, "waiting for scores")[0] == pytest.approx(0.4)
    assert figures(out, "devices idle, shared by both")[0] == pytest.approx(100 * 0.4 / figures(out, "round, seconds")[0], abs=0.06)


def test_the_how_to_is_right(capsys) -> None:
    page = (ROOT / "docs/how_to/plan_simulate.md").read_text(encoding="utf-8")
    (command,) = (line for line in page.splitlines() if line.startswith("    megatron-r1") and "--engines" in line)
    words = shlex.split(command)
    assert words[:3] == ["megatron-r1", "plan", "simulate"]
    code, _, err = simulate(capsys, *words[3:], "--rounds", "1", "grpo.prompts_per_rollout=32")
    assert (code, err) == (0, "") and "idle in the tail of others" in page.lower()
    with pytest.raises(SystemExit, match="0"):
        main(["plan", "simulate", "--help"])
    known = re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)
    named = set(re.findall(r"`(--[a-z-]+)", page))
    assert named == {*known} - {"--config"}


def test_a_run_is_played_again_with_its_own_rates(capsys, tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_run(run, SETUP, 8)
    settings = {
        "run_dir": str(run),
        "grpo": {"prompts_per_rollout": SETUP.prompts, "group_size": SETUP.group_size},
        "rollout": {"max_num_seqs": 8, "max_response_tokens": 300, "placement": "colocated", "dispatch": "fixed"},
    }
    (run / "config.yaml").write_text(yaml.safe_dump(settings))
    code, out, err = simulate(capsys, "--like", str(run), "--engines", "2", "--lengths", f"replay:{run}", "--rounds", "8")
    assert (code, err) == (0, "")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    recorded = [record["seconds/step"] for record in records[2:]]
    assert figures(out, "round, seconds")[0] == pytest.approx(sum(recorded) / len(recorded), rel=0.01)
    assert simulate(capsys, "--like", str(run), "--engines", "2", "rollout.max_num_seqs=2")[0] == 0  # other settings than its own


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (["--decode", "1:1"], "--lengths is needed"),
        (["--lengths", "equal:5"], "--decode is needed"),
        (["--decode", "1:1", "--lengths", "equal:5", "rollout.placement=colocated"], "--engines is needed"),
        (["--decode", "1:1", "--lengths", "equal:5", "--cache-tokens", "5"], "has no room"),
        (["--decode", "1:1", "--lengths", "equal:5", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--like", "nowhere"], "no config.yaml"),
        (["--decode", "1:1", "--lengths", "equal:5", "grpo.no_such=1"], "no_such"),
    ),
)  # fmt: skip
def test_what_is_missing_or_wrong_is_one_line(capsys, arguments: list[str], said: str) -> None:
    code, out, err = simulate(capsys, *arguments)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "option", ("--decode=2:1,1:2", "--decode=1:2,4:1", "--decode=1", "--engines=0", "--oversampling=0.5", "--seed=-1")
)
def test_options_that_are_no_numbers_are_one_line(capsys, option: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "simulate", option])
    assert capsys.readouterr().err.count("\n") == 1
