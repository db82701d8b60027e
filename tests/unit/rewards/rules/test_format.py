"""The format rewards: the R1-Zero template and the R1 chat format."""

from typing import get_args

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.data.chat.prompt_templates import TEMPLATES, render
from megatron_r1.rewards.rules.format import FormatScorer, follows_chat_format, follows_format
from megatron_r1.rewards.scorers import FORMATS, OPENINGS, scorer_specs
from tests.direct_scoring import DirectScoring


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


CHAT = [
    "<think>\na\n</think>\n\nb",
    "<think>\nOne.\n\nTwo, x < 3.\n</think>\n\n**Solution:** \\boxed{9}\n",
    "<think>\n\na\n\n</think>\n\n\nb\n\n",
    "<think>\n一\n</think>\n\n<answer>九</answer>",
]


@pytest.mark.parametrize("text", CHAT)
def test_the_chat_format_is_reasoning_and_summary(text):
    assert follows_chat_format(text)
    assert follows_chat_format(text.removeprefix("<think>\n"), opened=True)


@pytest.mark.parametrize("text", CHAT)
def test_the_opening_tag_stands_either_in_the_prompt_or_in_the_response(text):
    assert not follows_chat_format(text, opened=True)
    assert not follows_chat_format(text.removeprefix("<think>\n"))


@pytest.mark.parametrize(
    "rest",
    [
        "",
        "a",
        "a\n</think>",
        "a\n</think>\n\n",
        "a\n</think>\n\n \n",
        "a\n</think>\nb",
        "a\n</think> b",
        "a</think>\n\nb",
        "\n</think>\n\nb",
        " \n</think>\n\nb",
        "a\n</think>\n\nb\n</think>\n\nc",
        "a\n</think>\n\nb<think>",
        "a<think>\n</think>\n\nb",
        "a\n</think >\n\nb",
        "a\n</THINK>\n\nb",
        "a\r\n</think>\r\n\r\nb",
    ],
)
def test_anything_else_is_not_the_chat_format(rest):
    assert not follows_chat_format("<think>\n" + rest)
    assert not follows_chat_format(rest, opened=True)
    assert not follows_chat_format(" <think>\na\n</think>\n\nb")


def test_the_scorer_takes_its_template_by_name():
    zero, chat = "<think>a</think><answer>b</answer>", "<think>\na\n</think>\n\nb"
    opened = chat.removeprefix("<think>\n")
    texts = {"zero": zero, "chat": chat, "chat_opened": opened}
    for template, own in texts.items():
        outcomes = [FormatScorer(template).score(text).outcome for text in texts.values()]
        assert outcomes == ["correct" if text == own else "wrong" for text in texts.values()]
    with pytest.raises(ValueError, match="zero, chat, chat_opened"):
        FormatScorer("r1")


def test_every_template_has_its_format():
    # What a tokenizer's own template asks for is not known.
    assert [*TEMPLATES, "tokenizer"] == [*FORMATS, "tokenizer"] == list(get_args(DataConfig.model_fields["template"].annotation))
    for template in TEMPLATES:
        spec = scorer_specs(RewardConfig(), ["format"], template)["format"]
        assert FormatScorer(**spec.settings)._follows is FormatScorer(FORMATS[template])._follows and spec.opening == ""
        assert render(template, "q").endswith("<think>\n") == (OPENINGS.get(template) == "<think>\n")


@pytest.mark.parametrize(
    ("response", "accuracy", "form"),
    [
        ("One and one.\n</think>\n\n\\boxed{2}", "correct", "correct"),
        ("One and one.\n</think>\n\n\\boxed{3}", "wrong", "correct"),
        ("<think>\nOne and one.\n</think>\n\n\\boxed{2}", "correct", "wrong"),
        ("One and one is \\boxed{2}", "wrong", "wrong"),  # the reasoning that the prompt opened never ends
    ],
)
def test_where_the_prompt_opens_the_reasoning_only_what_follows_its_end_is_the_answer(response, accuracy, form):
    scoring = DirectScoring(RewardConfig(answer_location="boxed"), template="r1_chat_think")
    assert scoring.submit("math", response, "2").result().outcome == accuracy
    assert scoring.submit("format", response).result().outcome == form
