"""Presets for GPUs fit, by the planner, and carry its figures as `make plans` writes them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from examples import plans
from megatron_r1.config.load import load_config
from megatron_r1.plan.job import read_job
from megatron_r1.plan.memory import plan_memory
from tests.paths import ROOT

EXAMPLES = ROOT / "examples"
ON_GPUS = {
    str(path.relative_to(EXAMPLES).with_suffix(""))
    for path in EXAMPLES.rglob("*.yaml")
    if re.search(r"device: cuda", path.read_text(encoding="utf-8"))
}
WITHOUT_RANKS = {"evaluate/recipe"}  # one engine, beside no trainer


def test_every_preset_for_gpus_is_planned() -> None:
    assert plans.PRESETS.keys() == ON_GPUS - WITHOUT_RANKS


@pytest.fixture(scope="module")
def texts() -> dict[Path, str]:
    return plans.new_texts()


@pytest.mark.parametrize("name", sorted(plans.PRESETS))
def test_a_preset_carries_the_planners_figures(name: str, texts: dict[Path, str]) -> None:
    path = EXAMPLES / f"{name}.yaml"
    assert path.read_text(encoding="utf-8") == texts[path], "run `make plans`"


@pytest.mark.parametrize("name", sorted(plans.PRESETS))
def test_a_preset_fits(name: str) -> None:
    assert plans.plan_of(name).shortfalls() == [], "change the preset so that it fits"


def test_one_nodes_table_is_the_planners(texts: dict[Path, str]) -> None:
    path = EXAMPLES / "one_node/README.md"
    assert path.read_text(encoding="utf-8") == texts[path], "run `make plans`"


def test_figures_replace_the_ones_before_behind_the_head() -> None:
    text = "# one\n# two\nrun_dir: x\n# three\n"
    first = plans.with_figures(text, "# plan: a\n# plan: b\n")
    assert first == "# one\n# two\n# plan: a\n# plan: b\nrun_dir: x\n# three\n"
    assert plans.with_figures(first, "# plan: c\n") == "# one\n# two\n# plan: c\nrun_dir: x\n# three\n"


def test_a_file_that_differs_is_named_and_a_preset_that_does_not_fit_ends_it(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    few = {"v3_671b/stage1": plans.PRESETS["v3_671b/stage1"]}
    monkeypatch.setattr(plans, "PRESETS", few)
    monkeypatch.setattr(plans, "ONE_NODE", plans.ONE_NODE[:1])
    readme = EXAMPLES / "one_node/README.md"
    assert plans.main(["--check"]) == 1 and capsys.readouterr().out == f"differs: {readme}\n"
    monkeypatch.setattr(plans, "PRESETS", {"v3_671b/stage1": plans.Preset("sft", 64, 8, "A100")})
    assert plans.main(["--check"]) == 1, "an A100 has as much, so the figures alone differ"
    kept = read_job(load_config(EXAMPLES / "v3_671b/stage1.yaml", ["runtime.recompute=none"]), "sft", nodes=64)
    monkeypatch.setattr(plans, "plan_of", lambda name: plan_memory(kept))
    capsys.readouterr()
    assert plans.main(["--check"]) == 2
    assert capsys.readouterr().err.startswith("v3_671b/stage1 does not fit: update needs ")


def test_v3s_own_recomputation_does_not_fit_without_its_fp8_and_schedule() -> None:
    def peak(*settings: str) -> float:
        config = load_config(EXAMPLES / "v3_671b/pretrain.yaml", list(settings))
        plan = plan_memory(read_job(config, "pretrain", nodes=256))
        return next(phase.device_bytes for phase in plan.phases if phase.name == "update, phase 0")

    assert peak("runtime.recompute=selective") > 130e9 and peak() < 40e9


def test_32k_tokens_of_the_smallest_student_need_recomputation() -> None:
    kept = read_job(load_config(EXAMPLES / "distill_qwen/qwen_1_5b.yaml", ["runtime.recompute=none"]), "sft", nodes=1)
    problem = plan_memory(kept).shortfalls()[0]
    assert "activations 10" in problem and problem.endswith("change runtime.recompute"), problem
