"""What a search finds: the fastest that fits first, reasons for the rest, and YAML that the run takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.plan.job import read_job
from megatron_r1.plan.memory import plan_memory
from megatron_r1.plan.search import LayoutChoice, SearchSetting, as_yaml, describe_search, pareto, search
from megatron_r1.plan.stage_time import Assumed, plan_time
from tests.paths import ROOT

SFT = ROOT / "examples/distill_qwen/qwen_14b.yaml"
MATH = ROOT / "examples/one_node/math.yaml"


@pytest.fixture(scope="module")
def found() -> list[LayoutChoice]:
    return search(SearchSetting(load_config(SFT, []), "sft", "H800", 1, 8))


def test_those_that_fit_come_first_by_time(found: list[LayoutChoice]) -> None:
    fits = [one.fits for one in found]
    assert fits == sorted(fits, reverse=True) and 0 < sum(fits) < len(fits)
    seconds = [one.seconds for one in found if one.fits]
    assert seconds == sorted(seconds)


def test_every_other_one_has_its_reason(found: list[LayoutChoice]) -> None:
    beyond = [one for one in found if not one.fits and not one.refused]
    assert beyond and all("GB of a device, which has" in one.reason for one in beyond)
    assert all(one.reason for one in found if one.refused)


def test_a_candidate_is_what_the_plan_says(found: list[LayoutChoice]) -> None:
    best = found[0]
    settings = [f"{key}={value}" for key, value in best.settings.items()]
    job = read_job(load_config(SFT, settings), "sft", "H800", 1)
    time, memory = plan_time(job), plan_memory(job)
    assert time is not None and best.seconds == time.seconds
    assert best.device_bytes == memory.peak.device_bytes and not memory.shortfalls()


def test_nothing_beats_those_of_the_front(found: list[LayoutChoice]) -> None:
    front = pareto(found)
    assert front[0].seconds == found[0].seconds
    for one in (one for one in found if one.fits):
        assert any(other.seconds <= one.seconds and other.device_bytes <= one.device_bytes for other in front)


def test_the_choice_is_yaml_that_the_run_takes(found: list[LayoutChoice], tmp_path: Path) -> None:
    path = tmp_path / "chosen.yaml"
    path.write_text(as_yaml(found[0].settings))
    parallel = load_config(path, []).parallel
    assert {f"parallel.{name}": getattr(parallel, name) for name in ("tp", "pp", "vpp", "ep")} == found[0].settings
    assert as_yaml(found[0].settings).rstrip() in describe_search(found)


def test_engines_are_chosen_for_the_best_layouts() -> None:
    config = load_config(MATH, ["rollout.placement=colocated", "grpo.prompts_per_rollout=64", "grpo.minibatch_size=256"])
    found = search(SearchSetting(config, "grpo", "H100", 1, 8, Assumed(response=500)))
    with_engine = [one for one in found if "rollout.tensor_parallel_size" in one.settings]
    assert len({tuple(one.settings[f"parallel.{name}"] for name in ("tp", "pp", "vpp", "ep")) for one in with_engine}) == 3
    assert "rollout.tensor_parallel_size" in found[0].settings, "the fastest has an engine of its own choice"


def test_the_command_of_the_how_to(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    page = (ROOT / "docs/how_to/plan.md").read_text(encoding="utf-8")
    command = next(line for line in page.splitlines() if line.startswith("    megatron-r1 plan --search"))
    assert cli.main(command.split()[1:]) == 0
    told = capsys.readouterr().out
    assert "fastest:\nparallel:\n  tp: " in told and "do not fit, the fastest of them:" in told and "too many weights" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--search", "--stage", "sft", "--config", str(SFT)], "--search needs --nodes N"),
        (
            ["--search", "--stage", "sft", "--nodes", "1", "--gpu", "cpu", "--config", str(SFT)],
            "has no device to plan for: give --gpu",
        ),
        (["--search", "--stage", "convert", "--nodes", "1", "--config", str(SFT)], "a conversion has no layout to choose by time"),
        (["--search", "--stage", "sft", "--nodes", "1", "--gpus-per-node", "1", "--config", str(SFT)], "sft: nothing fits 1 node"),
    ],
)
def test_what_cannot_be_searched_is_one_line(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", *arguments]) == 2
    assert said in capsys.readouterr().err
