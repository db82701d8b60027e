import json
import random
import time
from fractions import Fraction
from pathlib import Path

import pytest
import torch

from megatron_r1.config.schema import DataConfig, RewardConfig
from megatron_r1.data.problems import load_problems
from megatron_r1.rewards.accuracy import AccuracyReward, answers_agree, parse_number
from megatron_r1.rewards.compose import build_reward, weighted_sum
from megatron_r1.rewards.format import FormatReward, follows_format
from megatron_r1.rewards.tags import find_boxed_answer, find_tagged_answer
from megatron_r1.types import Prompt, Rollout, RolloutGroup

DATA = Path(__file__).parents[2].parent / "shared/data"
HUGE = "9" * 10_000_000


def prompt_for(answer: str) -> Prompt:
    return Prompt("p", "question", answer, "text", (1,))


def rollout(text: str, finished: bool = True) -> Rollout:
    return Rollout([5, 2], [0.0, 0.0], text, finished)


def accuracy(text: str, answer: str = "8", location: str = "answer_tag", finished: bool = True) -> float:
    return AccuracyReward(location).score(prompt_for(answer), rollout(text, finished))


@pytest.mark.parametrize(
    "text",
    [
        "<think>a</think><answer>b</answer>",
        " \n<think>\nx < 3 and <b>bold</b>\n</think>\n\n<answer> 8 </answer>\n",
        "<think>一6</think> <answer>\\boxed{3}</answer>",
    ],
)
def test_the_format_is_one_reasoning_and_one_answer(text):
    assert follows_format(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "8",
        "<answer>8</answer>",
        "<think>a</think>8",
        "<think>a</think><answer>8",
        "<think>a<answer>8</answer>",
        "Well, <think>a</think><answer>8</answer>",
        "<think>a</think> so <answer>8</answer>",
        "<think>a</think><answer>8</answer> done",
        "<think>a</think><answer>8</answer><answer>8</answer>",
        "<think>a</think><think>b</think><answer>8</answer>",
        "<think>a<think>b</think></think><answer>8</answer>",
        "<think>a</think><answer><answer>8</answer></answer>",
        "<think>a<answer>8</answer></think>",
        "<think>a<answer></think>8</answer>",
        "<answer>8</answer><think>a</think>",
        "</think>a<think><answer>8</answer>",
        "<think>a</think></answer>8<answer>",
        "<think> </think><answer>8</answer>",
        "<think>a</think><answer>\n</answer>",
        "<THINK>a</THINK><ANSWER>8</ANSWER>",
        "<think >a</think><answer>8</answer>",
        "＜think＞a＜/think＞＜answer＞8＜/answer＞",
    ],
)
def test_anything_else_is_not_the_format(text):
    assert not follows_format(text)


def test_a_response_cut_at_the_length_limit_earns_nothing():
    text = "<think>a</think><answer>8</answer>"
    assert FormatReward().score(prompt_for("8"), rollout(text)) == accuracy(text) == 1.0
    assert FormatReward().score(prompt_for("8"), rollout(text, finished=False)) == accuracy(text, finished=False) == 0.0


@pytest.mark.parametrize(
    "text",
    [
        "<answer>8</answer>",
        "<think>a</think>So 8.<answer>8</answer>",
        "first 12 fourth 8</think><answer>8</answer>",  # the prompt ended in a forced <think>
        "<think>a</think><think>b</think><answer> 8. </answer> bye",
    ],
)
def test_accuracy_needs_the_answer_element_but_not_the_whole_format(text):
    assert accuracy(text) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "8",
        "<think>8</think>8",
        "<think><answer>8</answer></think>",
        "<think>a <answer>8</answer>",
        "<think>a</think>b<think>c<answer>8</answer>",
        "<answer>8</answer><think>a</think>",
        "<answer></think>8</answer>",
        "<think>a</think><answer>8</answer><answer>8</answer>",
        "<think>a</think><answer>7</answer><answer>8</answer>",
        "<think><answer>7</answer></think><answer>8</answer>",
        "<think>a</think><answer><answer>8</answer>",
        "<think>a</think></answer>8<answer>",
        "<think>a</think><answer>8",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>7 or 8</answer>",
        "<think>a</think><answer>7=8</answer>",
        "<think>a</think><answer>88</answer>",
        "<think>a</think><answer>-8</answer>",
        "<think>a</think><answer>\\boxed{8}</answer>",
        "<think>a</think><answer>８</answer>",
        "<think>a</think><answer>٨</answer>",
        "<think>a</think><answer>⑧</answer>",
        "<think>a</think><answer>8</answer>".replace("<", "&lt;"),
        "<think>a</think><answer>0b1000</answer>",
        "<think>a</think><answer>2**3</answer>",
        "<think>a</think><answer>__import__('os')</answer>",
    ],
)
def test_accuracy_takes_the_answer_from_its_place_only(text):
    assert accuracy(text) == 0.0


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("<think>\\boxed{1}</think> so \\boxed{2} no, \\boxed{ \\frac{1}{2} }", "\\frac{1}{2}"),
        ("\\boxed{8}", "8"),
        ("a</think>\\boxed{8}", "8"),
        ("<think>\\boxed{8}</think>", None),
        ("<think>\\boxed{8}", None),
        ("\\boxed{8}<think>", None),
        ("\\boxed{7}\\boxed{8", None),
        ("\\boxed{{{8}}", None),
        ("\\boxed 8", None),
        ("boxed{8}", None),
        ("", None),
        ("\\boxed{" + "8" * 2000 + "}", None),
    ],
)
def test_the_boxed_answer_is_the_last_one_after_the_reasoning(text, found):
    assert find_boxed_answer(text) == found


def test_the_config_says_where_the_answer_stands():
    assert accuracy("<think>a</think>\\boxed{8}<answer>7</answer>", location="boxed") == 1.0
    assert accuracy("<think>a</think>\\boxed{8}<answer>7</answer>", location="answer_tag") == 0.0


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("1234", "1,234"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("\\$18", "18"),
        ("$18$", "18"),
        ("50%", "50"),
        ("50 \\%", "50"),
        ("8.0", "8"),
        ("8.", "8"),
        (".5", "1/2"),
        ("2/4", "0.5"),
        ("+3", "3"),
        ("\u22123", "-3"),
        ("1e3", "1000"),
        ("007", "7"),
        ("x + 1", "x  +\n1"),
        ("Monday.", "Monday"),
        ("(1, 2)", "(1, 2)"),
    ],
)
def test_answers_that_agree(answer, reference):
    assert answers_agree(answer, reference) and answers_agree(reference, answer)


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("", ""),
        (" ", "8"),
        ("12", "1,2"),
        ("1 2", "12"),
        ("1,2345", "12345"),
        ("8.0000000000000000000000001", "8"),
        ("0.3333333333333333", "1/3"),
        ("1/0", "0"),
        ("1/0", "2/0"),
        ("8 apples", "8"),
        ("1/2/2", "1/4"),
        ("nan", "0"),
        ("inf", "1e99"),
        ("1_0", "10"),
        ("0x10", "16"),
        ("٤", "4"),
        ("²", "2"),
        ("--8", "8"),
        ("8%%", "8"),
        ("monday", "Monday"),
        ("1e999999999", "1e999999998"),
        ("$", "$$"),
    ],
)
def test_answers_that_do_not_agree(answer, reference):
    assert not answers_agree(answer, reference) and not answers_agree(reference, answer)


def test_numbers_are_exact_and_bounded():
    assert parse_number("0.1") == Fraction(1, 10)
    assert parse_number("-12/18") == Fraction(-2, 3)
    for text in (
        "1e999999999",
        "1e-999999999",
        "1e100",
        "9" * 101,
        "1/" + "0" * 200,
        "e5",
        ".",
        "+",
        "-",
        ",",
        "$",
        "%",
        "1,",
        ",1",
        "1e",
    ):
        assert parse_number(text) is None, text


@pytest.mark.parametrize("location", ["answer_tag", "boxed"])
@pytest.mark.parametrize(
    "body",
    [HUGE, "1e" + HUGE, "1/" + HUGE, "<answer>" * 500_000, "<think>" * 500_000, "\\boxed{" * 500_000, "{" * 5_000_000, ",".join(["111"] * 1_000_000),
     " " * 10_000_000, "\u0000\ud800\uffff" * 100_000],
    ids=["digits", "exponent", "denominator", "answers", "thinks", "boxes", "braces", "commas", "spaces", "not-text"],
)  # fmt: skip
def test_hostile_responses_cost_little_and_earn_nothing(body, location):
    reward = build_reward(RewardConfig(answer_location=location))
    responses = [f"<think>a</think><answer>{body}</answer>", f"<think>a</think>\\boxed{{{body}}}", body]
    group = RolloutGroup(prompt_for("8"), [rollout(text) for text in responses], 0)
    start = time.process_time()
    reward(group)
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
        reward = build_reward(RewardConfig(answer_location=location))
        texts = ["".join(rng.choices(pieces, k=rng.randint(0, 30))) for _ in range(5000)]
        group = RolloutGroup(prompt_for("8"), [rollout(text) for text in texts], 0)
        reward(group)
        assert not any(group.reward_parts["accuracy"])
        assert set(group.reward_parts["format"]) <= {0.0, 1.0}


def test_composition_fills_the_group_with_the_weighted_sum():
    texts = ["<think>a</think><answer>8</answer>", "<answer>8</answer>", "<think>a</think><answer>7</answer>", "8"]
    group = RolloutGroup(prompt_for("8"), [rollout(text) for text in texts], 0)
    build_reward(RewardConfig(accuracy_weight=1.0, format_weight=0.5))(group)
    assert group.reward_parts == {"accuracy": [1, 1, 0, 0], "format": [1, 0, 1, 0]}
    assert group.rewards_G.dtype == torch.float64 and group.rewards_G.tolist() == [1.5, 1.0, 0.5, 0.0]


def test_the_default_weights_are_equal_and_a_weight_of_zero_is_still_measured():
    group = RolloutGroup(prompt_for("8"), [rollout("<think>a</think><answer>7</answer>"), rollout("<answer>8</answer>")], 0)
    build_reward(RewardConfig())(group)
    assert group.rewards_G.tolist() == [1.0, 1.0]
    build_reward(RewardConfig(format_weight=0.0))(group)
    assert group.rewards_G.tolist() == [0.0, 1.0] and group.reward_parts["format"] == [1.0, 0.0]


def test_another_reward_fits_the_interface():
    class LengthReward:
        name = "length"

        def score(self, prompt: Prompt, rollout: Rollout) -> float:
            return float(len(rollout.token_ids))

    group = RolloutGroup(prompt_for("8"), [rollout("8")], 0)
    weighted_sum([(0.25, LengthReward()), (1.0, FormatReward())])(group)
    assert group.rewards_G.tolist() == [0.5] and group.reward_parts == {"length": [2.0], "format": [0.0]}


def test_gsm8k_answers_agree_with_themselves_and_with_no_other_number():
    path = DATA / "math/gsm8k_train.jsonl"
    if not path.exists():
        pytest.skip(f"needs {path.name}")
    answers = [p.answer for p in load_problems(DataConfig(source=str(path), answer_format="gsm8k")).fixed_problems()]
    raw = [json.loads(line)["answer"].rpartition("####")[2].strip() for line in path.read_text().splitlines()]
    for answer in answers:
        assert accuracy(f"<think>a</think><answer>${answer}</answer>", answer) == 1.0
    assert sum("," in text for text in raw) > 50
    for first, second in zip(answers, answers[1:] + answers[:1], strict=True):
        assert answers_agree(first, second) == (Fraction(first) == Fraction(second))


def test_only_an_answer_element_is_found():
    assert find_tagged_answer("<think>a</think><answer> 8 </answer>") == "8"
    assert find_tagged_answer("<answer>" + "8" * 1001 + "</answer>") is None
