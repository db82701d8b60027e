"""Rewards of one's own: what a function gets, what becomes of what it returns, and what is refused before a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_r1 import cli
from megatron_r1.config.load import load_config
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.errors import ConfigError
from megatron_r1.pipeline.builders.rewards import check_custom_rewards, open_scoring
from megatron_r1.rewards.compose import Composition, describe_rewards, fill_rewards
from megatron_r1.rewards.custom import CustomScorer, custom_reference, verdict_of
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.scorers import needed_scorers, scorer_specs
from megatron_r1.runtime import distributed
from megatron_r1.types import Prompt, Rollout, RolloutGroup

MATH = Prompt("p-1", "What is 3 + 5?", "8", "text", (1,), "en")
MODULE = '''
import os, time

def echo(prompt, response, reference):
    """A number as the response says, or what Python makes of it."""
    return eval(response)

def seen(prompt, response, reference, *, bonus, cut=False):
    what = (prompt.id, prompt.question, prompt.domain, prompt.language, prompt.kind, response, reference, bonus, cut)
    return {"score": 0.25, "outcome": "correct", "detail": repr(what)}

def finished_only(prompt, response, reference):
    return len(response) / 10

def json_answer(prompt, response, reference):
    return 1 if reference["target"] == int(response) else 0

def two(prompt, response):
    return 1.0

def required(prompt, response, reference, weight_of_digits):
    return 1.0

async def later(prompt, response, reference):
    return 1.0

class Reward:
    def __init__(self, prompt, response, reference):
        pass

VALUE = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's folder, in which the command is run."""
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import nothing_like_this\n")
    (tmp_path / "my_exit.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setattr(distributed, "_STORE", None)  # a command is a process: forget where ranks met in the tests before
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def settings(*customs: dict, **others) -> RewardConfig:
    return RewardConfig.model_validate({"custom": list(customs), "workers": 1, **others})


def custom(function: str, name: str = "mine", **others) -> dict:
    return {"name": name, "function": f"my_rewards:{function}", **others}


def score(config: RewardConfig, *groups: RolloutGroup) -> None:
    """Score as a run does, in worker processes."""
    names = needed_scorers(config, {group.prompt.domain for group in groups if group.prompt.kind == "reasoning"})
    with open_scoring(config, scorer_specs(config, names, "r1_zero")) as scoring:
        composition = Composition(config, scoring)
        for group, verdicts in zip(groups, composition.collect(groups), strict=True):
            fill_rewards(config, group, verdicts)


def group_of(*texts: str, prompt: Prompt = MATH, finished: bool = True) -> RolloutGroup:
    return RolloutGroup(prompt, [Rollout([5, 2], [0.0, 0.0], text, finished) for text in texts], 0)


def test_every_result_and_every_failure_has_its_outcome_and_the_others_go_on():
    results = {
        "1": (1.0, "correct"),
        "0.5": (0.5, "wrong"),
        "True": (1.0, "correct"),
        "-3": (-3.0, "wrong"),
        "{'score': 0.5, 'outcome': 'correct'}": (0.5, "correct"),
        "{'score': None}": (None, "unscorable"),
        "float('nan')": (None, "error"),
        "float('inf')": (None, "error"),
        "None": (None, "error"),
        "'1'": (None, "error"),
        "{}": (None, "error"),
        "{'score': 1, 'reason': 'x'}": (None, "error"),
        "{'score': 1, 'outcome': 'fine'}": (None, "error"),
        "{'score': 1, 'outcome': 'error'}": (None, "error"),
        "1 / 0": (None, "error"),
        "exit()": (None, "error"),
        "os._exit(0)": (None, "error"),
        "bytearray(1 << 40)": (None, "error"),
        "__import__('megatron_r1.errors').errors.RewardError": (None, "error"),
        "(_ for _ in ()).throw(__import__('megatron_r1.errors').errors.RewardError('no'))": (None, "error"),
        "time.sleep(60)": (None, "timeout"),
        "1.0": (1.0, "correct"),
    }
    group = group_of(*results)
    score(settings(custom("echo", time_limit_seconds=1.0)), group)
    found = zip(group.reward_parts["mine"], group.reward_outcomes["mine"], strict=True)
    assert dict(zip(results, found, strict=True)) == results
    details = dict(zip(results, group.reward_details["mine"], strict=True))
    assert details["1 / 0"] == "ZeroDivisionError: division by zero"
    assert details["None"] == "TypeError: the function returned NoneType, expected a number, a dict with a score, or a Verdict"
    metrics = describe_rewards([group])
    assert metrics["reward/outcome/mine/timeout"] == 1 / len(results) and metrics["reward/outcome/mine/error"] == 14 / len(results)
    assert metrics["reward/mine"] == pytest.approx((1 + 0.5 + 1 - 3 + 0.5 + 1) / 6)


def test_a_function_gets_prompt_response_reference_and_settings_and_says_why():
    config = settings(custom("seen", settings={"bonus": [1, {"a": None}]}))
    group, cut = group_of("hm"), group_of("hm", finished=False)
    score(config, group, cut)
    seen = ("p-1", "What is 3 + 5?", "math", "en", "reasoning", "hm", "8", [1, {"a": None}])
    assert group.reward_details["mine"] == [repr((*seen, False))] and cut.reward_details["mine"] == [repr((*seen, True))]
    assert group.reward_parts["mine"] == [0.25] and group.reward_outcomes["mine"] == ["correct"]


def test_the_weight_counts_and_a_weight_of_zero_measures_only():
    group = group_of("x" * 10, "x" * 5)
    score(settings(custom("finished_only", weight=2.0), custom("finished_only", "other", weight=0.0)), group)
    assert group.rewards_G.tolist() == [2.0, 1.0] and group.reward_parts["other"] == [1.0, 0.5]


def test_a_cut_response_scores_zero_unless_the_function_has_a_parameter_for_it():
    group = group_of("x" * 10, finished=False)
    score(settings(custom("finished_only")), group)
    assert group.reward_parts["mine"] == [0.0] and group.reward_details["mine"] == ["cut at the length limit"]


def test_a_reward_can_be_for_one_kind_of_prompt():
    config = settings(custom("finished_only", prompts="general"), custom("finished_only", "all"), model="reward_models")
    general = Prompt("g", "hi", "", "text", (1,), kind="general")
    math, chat = group_of("x"), group_of("x", prompt=general)
    score(config, math, chat)
    assert set(math.reward_parts) == {"accuracy", "format", "all"} and set(chat.reward_parts) == {"format", "mine", "all"}


def test_a_domain_of_ones_own_is_scored_by_a_function_or_by_a_built_in_scorer():
    config = settings(
        custom("json_answer", json_reference=True), domains={"countdown": "mine", "stem": "choice"}, accuracy_weight=3.0
    )
    own = group_of("24", "25", prompt=Prompt("c", "q", '{"target": 24}', "t", (1,), domain="countdown"))
    bad = group_of("24", prompt=Prompt("c", "q", "{", "t", (1,), domain="countdown"))
    stem = group_of("ANSWER: B", prompt=Prompt("s", "q", "B", "t", (1,), domain="stem"))
    cut = group_of("24", prompt=own.prompt, finished=False)
    score(config, own, bad, stem, cut)
    assert own.reward_parts == {"accuracy": [1.0, 0.0], "format": [0.0, 0.0]} and own.rewards_G.tolist() == [3.0, 0.0]
    assert bad.reward_outcomes["accuracy"] == ["unscorable"] and stem.reward_parts["accuracy"] == [1.0]
    assert cut.reward_details["accuracy"] == ["cut at the length limit"]


@pytest.mark.parametrize(
    ("reward", "says"),
    [
        ({"name": "accuracy", "function": "a:b"}, "reward.custom.accuracy: the name is that of a built-in reward or scorer"),
        ({"name": "math", "function": "a:b"}, "reward.custom.math: the name is that of a built-in reward or scorer"),
        ({"name": "mine", "function": "a.b"}, "reward.custom.mine.function=a.b is no import path: write package.module:function"),
        ({"name": "mine", "function": "a:b", "settings": {"cut": 1}}, "settings.cut is an argument that every custom reward gets"),
        ({"name": "mine", "function": "a:b", "weigth": 1}, "'reward.custom.0.weigth'"),
        ({"name": "a/b", "function": "a:b"}, "'reward.custom.0.name' .* is 'a/b', expected"),
        ({"function": "a:b"}, "'reward.custom.0.name'"),
        ({"name": "mine", "function": "a:b", "time_limit_seconds": 0}, "'reward.custom.0.time_limit_seconds' .* is 0, expected"),
    ],
)
def test_settings_that_cannot_work_are_one_line_when_they_are_read(folder, reward, says):
    (folder / "run.yaml").write_text(json.dumps({"reward": {"custom": [reward]}}))
    with pytest.raises(ConfigError, match=says) as caught:
        load_config(folder / "run.yaml")
    assert "\n" not in str(caught.value)


def test_two_of_one_name_an_unknown_scorer_and_a_weight_without_effect_are_refused():
    for text, says in (
        ("reward.custom=[{name: a, function: 'b:c'}, {name: a, function: 'b:d'}]", "two custom rewards have this name"),
        ("reward.domains.stem=chioce", "reward.domains.stem=chioce is no scorer of accuracy; there are math, code, choice"),
    ):
        with pytest.raises(ConfigError, match=says):
            load_config(None, [text])
    with pytest.raises(ConfigError, match="reward.custom.a.weight=2 has no effect"):
        load_config(None, ["reward.custom=[{name: a, function: 'b:c', weight: 2.0}]", "reward.domains.x=a"])
    config = load_config(None, ["reward.custom=[{name: a, function: 'b:c'}]", "reward.domains.x=a"])
    assert config.reward.domains == {"x": "a"}


@pytest.mark.parametrize(
    ("function", "says"),
    [
        ("no_such_module:f", "reward.custom.mine.function=no_such_module:f: no_such_module cannot be imported"),
        ("my_broken:f", "my_broken cannot be imported .No module named 'nothing_like_this'."),
        ("my_rewards:f", "my_rewards holds no function f"),
        ("my_rewards:VALUE", "my_rewards holds no function VALUE"),
        ("my_rewards:two", r"called as two\(prompt, response, reference\), .*too many positional arguments"),
        ("my_rewards:required", "missing a required argument: 'weight_of_digits'"),
        ("my_rewards:Reward", "is a class: name a plain function"),
        ("my_rewards:later", "is an async function: name a plain function"),
        ("my_exit:f", "scoring workers end while starting"),
    ],
)
def test_a_function_that_cannot_be_called_is_one_line_and_code_2_before_anything_is_built(folder, capsys, function, says):
    with pytest.raises(ConfigError, match=says) as caught:
        check_custom_rewards(settings({"name": "mine", "function": function}))
    assert "\n" not in str(caught.value)


def test_a_run_stops_at_its_start(folder, capsys):
    (folder / "run.yaml").write_text(json.dumps({"run_dir": "run", "reward": {"custom": [custom("f")]}}))
    assert cli.main(["grpo", "--config", "run.yaml"]) == 2
    assert capsys.readouterr().err.strip() == (
        "megatron-r1: error: reward.custom.mine.function=my_rewards:f: my_rewards holds no function f: correct the name"
    )
    assert not (folder / "run").exists()


def test_settings_that_the_function_does_not_take_are_refused():
    with pytest.raises(ConfigError, match="got an unexpected keyword argument 'bonus'"):
        check_custom_rewards(settings(custom("finished_only", settings={"bonus": 1})))
    check_custom_rewards(settings(custom("finished_only")))
    check_custom_rewards(settings())


def test_a_verdict_of_ones_own_must_be_able_to_leave_the_process():
    assert verdict_of(Verdict(0.5, "correct", "a\nb")) == Verdict(0.5, "correct", "a b")
    with pytest.raises(TypeError):
        verdict_of(Verdict(0.5, "correct", parts={"a": object()}))


def test_only_the_first_failure_is_printed(capsys):
    scorer = CustomScorer("mine", "my_rewards:echo", {}, False)
    for _ in range(3):
        assert scorer.score("1 / 0", custom_reference(MATH, "8")).outcome == "error"
    assert capsys.readouterr().err.count("ZeroDivisionError") == 1


def test_a_file_is_scored_by_a_function_given_by_name_or_path(folder, capsys):
    lines = [
        {"id": 7, "question": "q", "response": "r", "answer": {"a": 1}, "domain": "games", "finished": False},
        {"response": "r"},
    ]
    (folder / "in.jsonl").write_text("\n".join(map(json.dumps, lines)))
    reward = custom("seen", settings={"bonus": 1})
    (folder / "run.yaml").write_text(json.dumps({"reward": {"custom": [reward]}}))
    files = ["--input", "in.jsonl", "--output", "out.jsonl", "--workers", "1"]
    assert cli.main(["score", "--reward", "mine", *files, "--config", "run.yaml"]) == 0
    first, second = (json.loads(line)["detail"] for line in (folder / "out.jsonl").read_text().splitlines())
    assert first == repr(("7", "q", "games", "", "reasoning", "r", {"a": 1}, 1, True))
    assert second == repr(("in.jsonl:2", "", "math", "", "reasoning", "r", None, 1, False))
    assert cli.main(["score", "--reward", "my_rewards:finished_only", *files]) == 0
    capsys.readouterr()
    assert cli.main(["score", "--reward", "my_rewards:f", *files]) == 2
    assert (
        capsys.readouterr().err == "megatron-r1: error: --reward my_rewards:f: my_rewards holds no function f: correct the name\n"
    )
