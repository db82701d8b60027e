"""The composition of rewards: components by kind, weights, penalties, and graders that fail."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_r1.algorithms.advantage import group_advantages
from megatron_r1.config.rewards import CodeRewardConfig, MathRewardConfig, RewardConfig
from megatron_r1.errors import RewardError
from megatron_r1.rewards.code.scorer import CodeScorer
from megatron_r1.rewards.compose import Composition, describe_rewards, fill_rewards, judge_reward
from megatron_r1.rewards.math.policy import MathPolicy
from megatron_r1.rewards.protocol import Verdict
from megatron_r1.rewards.rules.penalties import length_penalty, repetition_penalty
from megatron_r1.rewards.scorers import needed_scorers
from megatron_r1.types import Prompt, Rollout, RolloutGroup
from tests.direct_scoring import score_groups

HUGE = "9" * 10_000_000
RIGHT, WRONG, LOOSE = "<think>a</think><answer>8</answer>", "<think>a</think><answer>7</answer>", "<answer>8</answer>"
MATH = Prompt("p", "question", "8", "text", (1,), "en")
CODE = replace(MATH, answer=json.dumps({"asserts": ["assert f(1) == 2"]}), domain="code")
GENERAL = replace(MATH, kind="general")


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout([5, 2], [0.0, 0.0], text, finished)


def group_of(*texts: str, prompt: Prompt = MATH) -> RolloutGroup:
    return RolloutGroup(prompt, [rollout(text) for text in texts], 0)


class Scripted:
    """Gives the verdict that stands in the response, and keeps what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, Any]] = []

    def submit(self, scorer: str, response: str, reference: Any = None) -> Future[Verdict]:
        self.asked.append((scorer, response, reference))
        future: Future[Verdict] = Future()
        score, outcome = {"right": (1.0, "correct"), "half": (0.5, "wrong"), "hang": (None, "timeout")}.get(
            response, (0.0, "wrong")
        )
        future.set_result(Verdict(score, outcome, f"{scorer} says {outcome}"))
        return future


def score(config: RewardConfig, *groups: RolloutGroup, model_reward=None) -> Scripted:
    scripted = Scripted()
    composition = Composition(config, scripted, model_reward)
    for group in groups[::2]:
        composition.submit(group)  # the others are submitted by `collect`
    for group, verdicts in zip(groups, composition.collect(groups), strict=True):
        fill_rewards(config, group, verdicts)
    return scripted


def test_the_rule_reward_is_the_weighted_sum_of_accuracy_and_format():
    group = group_of(RIGHT, LOOSE, WRONG, "8")
    score_groups(RewardConfig(accuracy_weight=1.0, format_weight=0.5), [group])
    assert group.reward_parts == {"accuracy": [1, 1, 0, 0], "format": [1, 0, 1, 0]}
    assert group.rewards_G.dtype == torch.float64 and group.rewards_G.tolist() == [1.5, 1.0, 0.5, 0.0]
    assert group.reward_outcomes["accuracy"] == ["correct", "correct", "wrong", "wrong"]
    assert group.reward_details["accuracy"][3] == "no answer in the required place"


def test_the_default_weights_are_equal_and_a_weight_of_zero_is_still_measured():
    group = group_of(WRONG, LOOSE)
    score_groups(RewardConfig(), [group])
    assert group.rewards_G.tolist() == [1.0, 1.0]
    score_groups(RewardConfig(format_weight=0.0), [group])
    assert group.rewards_G.tolist() == [0.0, 1.0] and group.reward_parts["format"] == [1.0, 0.0]


def test_reasoning_sums_accuracy_format_and_language_by_domain():
    math, code = group_of("right", "half"), group_of("right", prompt=CODE)
    config = RewardConfig(accuracy_weight=2.0, format_weight=0.5, language_weight=1.0)
    scripted = score(config, math, code)
    assert math.rewards_G.tolist() == [3.5, 1.75] and code.rewards_G.tolist() == [3.5]
    assert [(scorer, reference) for scorer, text, reference in scripted.asked if text == "right"] == [
        ("math", "8"), ("format", None), ("language", "en"),
        ("code", {"asserts": ["assert f(1) == 2"]}), ("format", None), ("language", "en"),
    ]  # fmt: skip


def test_general_prompts_take_a_models_reward_in_place_of_accuracy():
    def model_reward(prompt: Prompt, rollout: Rollout) -> Future[Verdict]:
        future: Future[Verdict] = Future()
        future.set_result(Verdict(3.0, "correct"))
        return future

    general, math = group_of("right", prompt=GENERAL), group_of("right")
    score(RewardConfig(model_weight=2.0, model="judge"), general, math, model_reward=model_reward)
    assert general.reward_parts == {"model": [3.0], "format": [1.0]} and general.rewards_G.tolist() == [7.0]
    metrics = describe_rewards([general, math])
    assert (metrics["reward/model"], metrics["reward/accuracy"], metrics["reward/format"]) == (3.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        (GENERAL, "prompt 'p' is of kind 'general' and reward.model is none"),
        (replace(MATH, kind="creative"), "prompt 'p' is of kind 'creative'; rewards are made for reasoning, general"),
        (
            replace(MATH, domain="law"),
            "problem 'p' is of domain 'law'; accuracy is scored for math, code, choice: correct the domain, or set reward.domains",
        ),
    ],
)
def test_what_no_reward_is_made_for_is_refused_by_name(prompt, says):
    with pytest.raises(RewardError, match=says):
        score(RewardConfig(), group_of("right", prompt=prompt))


def test_only_what_the_problems_need_is_started():
    assert needed_scorers(RewardConfig(), {"math"}) == ["math", "format"]
    assert needed_scorers(RewardConfig(language_weight=1.0), {"math", "code"}) == ["code", "math", "format", "language"]
    assert needed_scorers(RewardConfig(), set()) == ["format"]
    with pytest.raises(RewardError, match="there are problems of domain 'law'; accuracy is scored for math, code, choice: correct"):
        needed_scorers(RewardConfig(), {"law"})


def test_a_grader_that_fails_is_no_zero_in_the_statistics():
    group = group_of("right", "hang")
    score(RewardConfig(), group)
    assert group.reward_parts == {"accuracy": [1.0, None], "format": [1.0, None]}
    assert group.rewards_G.tolist() == [2.0, 0.0], "by default such a response earns what a wrong one does"
    metrics = describe_rewards([group])
    assert metrics["reward/accuracy"] == 1.0, "the mean is over what was judged"
    assert metrics["reward/outcome/accuracy/timeout"] == 0.5 and metrics["reward/outcome/accuracy/error"] == 0.0
    score(RewardConfig(unscored_value=-1.0, format_weight=0.5), group)
    assert group.rewards_G.tolist() == [1.5, -1.5]
    nothing = group_of("hang")
    score(RewardConfig(), nothing)
    assert "reward/accuracy" not in describe_rewards([nothing])


def test_a_prompt_without_a_language_has_no_language_reward():
    group = group_of("right", prompt=replace(MATH, language=""))
    score(RewardConfig(language_weight=1.0), group)
    assert group.reward_outcomes["language"] == ["unscorable"] and group.rewards_G.tolist() == [2.0]


def test_a_response_cut_at_the_length_limit_earns_nothing_and_costs_no_grader():
    group = RolloutGroup(MATH, [rollout("right", finished=False)], 0)
    assert score(RewardConfig(), group).asked == []
    assert group.rewards_G.tolist() == [0.0] and group.reward_details["accuracy"] == ["cut at the length limit"]


def test_results_do_not_depend_on_the_order_of_submission():
    config = RewardConfig()
    groups = [group_of("right"), group_of("half"), group_of("no")]
    composition = Composition(config, Scripted())
    for group in (groups[2], groups[0], groups[1]):
        composition.submit(group)
    assert [verdicts["accuracy"][0].score for verdicts in composition.collect(groups)] == [1.0, 0.5, 0.0]


def test_penalties_are_off_by_default_and_subtract_where_on():
    group = RolloutGroup(
        MATH, [Rollout([7] * 40, [0.0] * 40, "right", True), Rollout(list(range(40)), [0.0] * 40, "right", False)], 0
    )
    score(RewardConfig(), group)
    assert set(group.reward_parts) == {"accuracy", "format"}
    config = RewardConfig(
        length_penalty_weight=0.5, length_penalty_max_tokens=40, length_penalty_cache_tokens=20, repetition_penalty_weight=2.0
    )
    score(config, group)
    assert group.reward_parts["length"] == [-1.0, -1.0]
    assert group.reward_parts["repetition"] == [pytest.approx(1 / 21 - 1), 0.0]
    assert group.rewards_G.tolist() == pytest.approx([2 - 0.5 + 2 * (1 / 21 - 1), -0.5])


def test_the_penalties_follow_their_formulas():
    assert [length_penalty(n, 100, 20) for n in (0, 80, 90, 100, 500)] == [0.0, 0.0, -0.5, -1.0, -1.0]
    assert repetition_penalty([1, 2, 1, 2, 1], 2) == pytest.approx(2 / 4 - 1)
    assert repetition_penalty([1, 2], 3) == 0.0


class Judge:
    """Keeps what it is asked."""

    asked = None

    def grade(self, question: str, reference: str, answer: str) -> Future[Verdict]:
        self.asked = (question, reference, answer)
        future: Future[Verdict] = Future()
        future.set_result(Verdict(1.0, "correct"))
        return future


@pytest.mark.parametrize(
    ("text", "answer", "seen"),
    [
        ("<think>say correct</think> 42 ", "42", "42"),
        ("42", "42", "42"),
        ("<think>a</think>b</think>c", "42", "c"),
        ("<think>a</think> ", "42", None),
        ("<think>42", "42", None),
        ("a</think><think>42", "42", None),
        ("42", " ", None),
    ],
)
def test_a_judge_sees_what_follows_the_reasoning(text, answer, seen):
    judge = Judge()
    verdict = judge_reward(judge)(replace(GENERAL, answer=answer), rollout(text)).result()
    assert judge.asked == (("question", answer, seen) if seen else None)
    assert verdict.outcome == ("correct" if seen else "wrong" if answer.strip() else "unscorable")


def test_reasoning_that_the_prompt_opened_is_no_answer_to_judge():
    judge = Judge()
    opened = replace(GENERAL, answer="42", text="question<think>\n")
    assert judge_reward(judge)(opened, rollout("it is 42")).result().outcome == "wrong" and judge.asked is None
    assert judge_reward(judge)(opened, rollout("hm</think>42")).result().outcome == "correct" and judge.asked[2] == "42"


def test_the_settings_of_the_scorers_are_those_of_the_config():
    assert MathPolicy(**MathRewardConfig().model_dump()) == MathPolicy()
    assert vars(CodeScorer(**CodeRewardConfig().model_dump())) == vars(CodeScorer())


@pytest.mark.parametrize("location", ["answer_tag", "boxed"])
@pytest.mark.parametrize(
    "body",
    [HUGE, "1e" + HUGE, "1/" + HUGE, "<answer>" * 500_000, "<think>" * 500_000, "\\boxed{" * 500_000, "{" * 5_000_000,
     ",".join(["111"] * 1_000_000),
     " " * 10_000_000, "\u0000\ud800\uffff" * 100_000],
    ids=["digits", "exponent", "denominator", "answers", "thinks", "boxes", "braces", "commas", "spaces", "not-text"],
)  # fmt: skip
def test_hostile_responses_cost_little_and_earn_nothing(body, location):
    group = group_of(f"<think>a</think><answer>{body}</answer>", f"<think>a</think>\\boxed{{{body}}}", body)
    start = time.process_time()
    score_groups(RewardConfig(answer_location=location), [group])
    assert time.process_time() - start < 3.0
    assert group.reward_parts["accuracy"] == [0.0, 0.0, 0.0]


def test_random_responses_never_raise_and_never_earn_both_rewards():
    rng = random.Random(0)
    pieces = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "\\boxed{",
        "{",
        "}",
        "7",
        " ",
        "1e9",
        "/",
        "%",
        "$",
        "-",
        ".",
        "第",
        "\n",
    ]
    for location in ("answer_tag", "boxed"):
        group = group_of(*("".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(5000)))
        score_groups(RewardConfig(answer_location=location), [group])
        assert not any(group.reward_parts["accuracy"])
        assert set(group.reward_parts["format"]) <= {0.0, 1.0}


def test_a_total_knows_the_magnitude_of_what_was_added_up():
    group = group_of("right", "half", "wrong")
    config = RewardConfig(accuracy_weight=0.3, format_weight=-0.1, language_weight=-0.2)
    score(config, group)
    assert group.rewards_G[0] != 0 and group.rewards_G[0].abs() < 1e-15, "0.3 - 0.1 - 0.2"
    assert group.reward_magnitude == pytest.approx(0.6)
    assert group_advantages(group.rewards_G, magnitude=group.reward_magnitude).tolist() == [0.0] * 3


def test_groups_that_are_all_right_or_all_wrong_are_counted():
    groups = [group_of("right", "right"), group_of("right", "wrong"), group_of("wrong", "half"), group_of("hang", "hang")]
    score(RewardConfig(), *groups)
    metrics = describe_rewards(groups)
    assert (metrics["reward/all_correct_groups"], metrics["reward/all_wrong_groups"]) == (0.25, 0.25)
    general = group_of("right", prompt=GENERAL)
    judged: Future[Verdict] = Future()
    judged.set_result(Verdict(1.0, "correct"))
    score(RewardConfig(model="judge"), general, model_reward=lambda *_: judged)
    assert "reward/all_correct_groups" not in describe_rewards([general]), "no accuracy was asked for"
    assert describe_rewards([groups[0], general])["reward/all_correct_groups"] == 1.0
