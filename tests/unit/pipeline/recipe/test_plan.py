"""The R1 pipeline's plan, settings, gates and small world; its stages themselves run in tests/pipeline."""

from __future__ import annotations

import json
import random
import sys
from dataclasses import replace

import pytest

from megatron_r1.cli import main
from megatron_r1.config.load import load_config
from megatron_r1.data.general import GeneralMix, Requests, load_general
from megatron_r1.data.preferences import read_labelled, read_pairs
from megatron_r1.data.problems import TallyProblems
from megatron_r1.data.tally.requests import draw_request, find_thought
from megatron_r1.data.tally.tokenizer import train_tally_chat_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.model.presets import resolve_architecture
from megatron_r1.pipeline.recipe import plan as recipe_module
from megatron_r1.pipeline.recipe import report as recipe_report
from megatron_r1.pipeline.recipe.folder import Recipe
from megatron_r1.pipeline.recipe.measure import Measured
from megatron_r1.pipeline.recipe.plan import check_gate, check_recipe, chosen_stages, run_recipe
from megatron_r1.pipeline.recipe.report import write_comparison
from megatron_r1.pipeline.recipe.stages import STAGES
from megatron_r1.rollout.options import engine_options
from tests.paths import ROOT

CONFIG = ROOT / "examples/tiny_cpu/r1.yaml"
sys.path.insert(0, str(ROOT / "tools"))
import make_tally_chat
import serve_tally_rules


def test_every_stage_needs_earlier_ones_only():
    names = list(STAGES)
    assert all(names.index(needed) < names.index(name) for name, stage in STAGES.items() for needed in stage.needs)
    assert STAGES["stage3"].needs[0] == "base", "the curated SFT starts from the base, not from the RL checkpoint"


def test_each_stage_has_the_settings_of_the_recipe():
    recipe = Recipe(load_config(CONFIG))
    check_recipe(recipe)
    zero, stage2, stage4 = (recipe.config_of(name) for name in ("zero", "stage2", "stage4"))
    assert zero.data.template == "r1_zero" and zero.reward.language_weight == 0 and zero.reward.answer_location == "answer_tag"
    assert stage2.grpo.clip_eps == 10 and stage2.reward.language_weight == 1 and stage2.data.template == "r1_chat"
    assert stage4.rollout.temperature == 0.7 and stage4.reward.model == "reward_models" and stage4.data.general_source
    assert stage4.run_dir == "runs/r1/stage4"


@pytest.mark.parametrize("stage", ["base", "student"])
def test_the_engine_takes_the_models_that_others_are_made_from(stage):
    config = Recipe(load_config(CONFIG)).config_of(stage)
    arch = resolve_architecture(config.model.preset, config.model.overrides)
    prompt = config.data.max_prompt_tokens
    engine_options(arch, config.rollout, device="cpu", dtype="float32", bos_token_id=0, eos_token_id=1, max_prompt_tokens=prompt)
    assert arch.vocab_size == 640, "one tokenizer for teacher and student"


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["recipe.stages={stage9: {}}"], "recipe.stages.stage9"),
        (["recipe.stages={stage2: {grpo: {clip_ep: 10}}}"], "grpo.clip_eps"),
        (["recipe.stages={stage2: {grpo: {clip_eps: -1}}}"], "recipe.stages.stage2"),
        (["recipe.gates={stage2: {speed: 1}}"], "recipe.gates.stage2.speed"),
    ],
)
def test_wrong_settings_are_named_before_the_first_stage(overrides, named):
    with pytest.raises(ConfigError) as caught:
        check_recipe(Recipe(load_config(CONFIG, overrides)))
    assert named in str(caught.value) and "\n" not in str(caught.value)


def test_stages_are_chosen_by_name():
    assert chosen_stages("stage2", "stage3") == ["stage2", "helpful", "safety", "stage3"]
    assert chosen_stages(None, None) == list(STAGES)
    with pytest.raises(ConfigError, match="--from stage5"):
        chosen_stages("stage5", None)
    with pytest.raises(ConfigError, match="comes before"):
        chosen_stages("stage3", "stage1")


def test_a_dry_run_prints_the_plan_and_makes_nothing(tmp_path, capsys):
    assert main(["pipeline", "r1", "--config", str(CONFIG), f"run_dir={tmp_path / 'run'}", "--dry-run", "--from", "stage2"]) == 0
    plan = capsys.readouterr().out.splitlines()
    assert len(plan) == len(STAGES) - 3 and plan[0].startswith("stage2") and "to do" in plan[0]
    assert not (tmp_path / "run").exists()


def test_a_stage_without_its_inputs_is_refused(tmp_path, capsys):
    arguments = ["pipeline", "r1", "--config", str(CONFIG), f"run_dir={tmp_path / 'run'}", "--from", "stage2", "--to", "stage2"]
    assert main(arguments) == 2
    assert "stage2 needs" in capsys.readouterr().err


def test_a_gate_stops_the_pipeline_and_says_why():
    config = load_config(CONFIG, ["recipe.gates={zero: {pass_at_1: 0.6, helpful: 0.1}}"])
    good = Measured("x", pass_at_1=0.6, format=1.0, language=1.0, readable=1.0, length=9.0, helpful=0.2)
    check_gate(config, "zero", good)
    check_gate(config, "stage1", good)
    for change, said in ({"pass_at_1": 0.59}, "0.590"), ({"helpful": None}, "was not measured"):
        with pytest.raises(DataError, match="zero misses its gate") as caught:
            check_gate(config, "zero", Measured(**{**vars(good), **change}))
        assert said in str(caught.value)


def test_what_came_before_the_reward_models_is_measured_again_when_they_are_there(tmp_path, monkeypatch):
    measured = Measured("x", pass_at_1=1.0, format=1.0, language=1.0, readable=1.0, length=9.0)
    done: list[str] = []

    def measure(recipe, stage, session):
        """As `measure_stage`: helpfulness only where both reward models are."""
        done.append(stage)
        judged = all(recipe.artifact(kind).exists for kind in ("helpful", "safety"))
        result = replace(measured, helpful=0.5 if judged else None)
        (recipe.root / stage / "measured").mkdir(parents=True, exist_ok=True)
        (recipe.root / stage / "measured/measured.json").write_text(json.dumps(vars(result)))
        return result

    def make(name):
        def run(recipe, session):
            recipe.artifact(name).folder.mkdir(parents=True, exist_ok=True)
            recipe.artifact(name).seal("x", {}, {})

        return run

    monkeypatch.setattr(recipe_module, "measure_stage", measure)
    monkeypatch.setattr(recipe_report, "write_report", lambda root: root)  # there are no runs to report on
    for name, stage in STAGES.items():
        monkeypatch.setitem(STAGES, name, replace(stage, run=make(name)))
    run_recipe(load_config(CONFIG, [f"run_dir={tmp_path}", "recipe.gates={}"]), None)
    models = [name for name, stage in STAGES.items() if stage.is_language_model]
    assert done == [*models, "base", "zero", "stage1", "stage2"]
    assert all(row["helpful"] == 0.5 for row in json.loads((tmp_path / "summary.json").read_text())["rows"])


def test_general_prompts_come_late_and_in_their_share():
    mix = GeneralMix(TallyProblems(0.1), Requests(0.1), first_position=100, share=0.5)
    kinds = [mix.train(position, 3).kind for position in range(1100)]
    assert set(kinds[:100]) == {"reasoning"}
    assert 430 < kinds[100:].count("general") < 570
    assert kinds == [mix.train(position, 3).kind for position in range(1100)]
    assert {problem.kind for problem in mix.heldout(20, 0)} == {"reasoning"} and mix.domains() == {"math"}
    assert {problem.preference for problem in Requests(0.1).heldout(64, 0)} == {"helpful", "safety"}


def test_general_prompts_of_a_file(tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text(json.dumps({"question": "Hi?", "kind": "general", "preference": "safety"}) + "\n", encoding="utf-8")
    config = load_config(None, [f"data.general_source={path}", "data.heldout_fraction=0.001"]).data
    assert load_general(config).train(0, 0).preference == "safety"
    path.write_text(json.dumps({"question": "1+1?", "answer": "2"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match="not of kind general"):
        load_general(config)
    path.write_text(json.dumps({"question": "Hi?", "kind": "general", "preference": "nice"}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"requests.jsonl:1: preference 'nice'"):
        load_general(config)


def test_the_small_world_is_consistent(tmp_path):
    rng = random.Random(0)
    tokenizer = train_tally_chat_tokenizer(640)
    seen = {heldout: {draw_request(rng, heldout, 0.1).question for _ in range(400)} for heldout in (True, False)}
    assert not seen[True] & seen[False]
    for _ in range(200):
        request = draw_request(rng, False, 0.1)
        assert find_thought(request.question) == request.thought
        assert not set(request.good) & set(request.poor)
        assert max(len(tokenizer.encode_plain(text)) for text in (*request.good, *request.poor)) < 24
    make_tally_chat.make_files(tmp_path, seed=0, heldout_fraction=0.1)
    pairs, labels = read_pairs(tmp_path / "helpful.jsonl"), read_labelled(tmp_path / "safety.jsonl")
    assert len(pairs) == make_tally_chat.COUNTS["pairs"] and {example.safe for example in labels} == {True, False}
    asked = {dialogue.messages[0].content for example in pairs + labels for dialogue in example.dialogues}
    assert not asked & seen[True], "nothing held out is in the preference data"


def test_the_rules_refuse_what_they_have_no_rule_for():
    for content in ("What is the capital of France?", "## Request\nSing.\n\n## Answer\nLa."):
        with pytest.raises(ValueError):
            serve_tally_rules.answer([{"role": "user", "content": content}])


def test_the_comparison_tells_what_holds_and_what_does_not(tmp_path, capsys):
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero/run.json").write_text('{"command": "grpo", "started": "2026-11-29T00:00:00+00:00"}')
    (tmp_path / "zero/config.yaml").write_text("seed: 0\n")
    (tmp_path / "zero/metrics.jsonl").write_text('{"step": 0}\n')
    for stage, readable, language in (("zero", 0.5, 0.9), ("stage1", 0.8, 0.9), ("stage2", 0.8, 0.8)):
        measured = Measured("x", 0.7, 0.9, language, readable, 12.0)
        (tmp_path / stage / "measured").mkdir(parents=True)
        (tmp_path / stage / "measured/measured.json").write_text(json.dumps(vars(measured)))
    text = write_comparison(tmp_path, {name: stage.title for name, stage in STAGES.items() if stage.is_language_model})
    assert "readable 80.0% (stage1) against 50.0% (zero)" in text and "language 80.0% (stage2) against 90.0% (zero)" in text
    assert text.count("holds here") == 1 and text.count("does NOT hold here") == 1
    assert "does NOT hold here" in (tmp_path / "report.html").read_text(encoding="utf-8")
