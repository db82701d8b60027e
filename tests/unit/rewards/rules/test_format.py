"""The format rewards: the R1-Zero template and the R1 chat format."""

import time
from typing import get_args

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.data.chat.prompt_templates import TEMPLATES, render
from megatron_r1.errors import ConfigError, RewardError
from megatron_r1.rewards.rules.format import FormatScorer, follows_chat_format, follows_format
from megatron_r1.rewards.rules.visible import has_visible
from megatron_r1.rewards.scorers import FORMATS, OPENINGS, needed_scorers, scorer_specs, with_format
from tests.direct_scoring import DirectScoring
from tests.patience import patient


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


INVISIBLE = {
    "space": " \t\n\u00a0\u2003\u3000",
    "zero-width space": "\u200b",
    "joiners": "\u200c\u200d\u2060",
    "byte order mark": "\ufeff",
    "soft hyphen": "\u00ad",
    "marks of direction": "\u200e\u200f\u202a\u202c\u2066\u2069",
    "variation selectors": "\ufe0f\ufe00\U000e0100",
    "Mongolian selectors": "\u180b\u180e",
    "tags": "\U000e0041\U000e0042",
    "Braille blank": "\u2800\u2800",
    "fillers of hangul": "\u3164\u115f\u1160\uffa0",
    "Khmer vowels": "\u17b4\u17b5",
    "accents alone": "\u0301\u0308\u20dd",
    "grapheme joiner": "\u034f",
    "control characters": "\x00\x07\x1b\x7f\x85",
    "private use": "\ue000\uf8ff",
    "not assigned": "\uffff\u0378",
    "half a surrogate pair": "\ud800",
    "line ends": "\u2028\u2029\x0b\x0c\r",
    "a mixture": "\u200b \ufeff\n\u0301\u2800",
}


@pytest.mark.parametrize("kind", INVISIBLE)
def test_what_cannot_be_seen_is_neither_reasoning_nor_answer(kind):
    blank = INVISIBLE[kind]
    assert not follows_format(f"<think>{blank}</think><answer>8</answer>")
    assert not follows_format(f"<think>a</think><answer>{blank}</answer>")
    assert not follows_chat_format(f"<think>\n{blank}\n</think>\n\nb")
    assert not follows_chat_format(f"<think>\na\n</think>\n\n{blank}")
    assert follows_format(f"<think>a{blank}</think><answer>{blank}8</answer>"), "beside what can be seen it does no harm"


@pytest.mark.parametrize(
    "text", ["a", "5", "\u4e00", "\uac00", "\u03b1", "...", "=", "\u2801", "\u00e9", "e\u0301", "\U0001f600", "\u2460", "-"]
)
def test_anything_that_can_be_seen_is_something(text):
    assert follows_format(f"<think>{text}</think><answer>{text}</answer>")
    assert follows_chat_format(f"<think>\n{text}\n</think>\n\n{text}")


CHAT = [
    "<think>\na\n</think>\n\nb",
    "<think>\nOne.\n\nTwo, x < 3.\n</think>\n\n**Solution:** \\boxed{9}\n",
    "<think>\n\na\n\n</think>\n\n\nb\n\n",
    "<think>\n一\n</think>\n\n<answer>九</answer>",
]


@pytest.mark.parametrize("text", CHAT)
def test_the_chat_format_is_reasoning_and_summary(text):
    assert follows_chat_format(text)


@pytest.mark.parametrize("text", CHAT)
def test_the_opening_tag_stands_either_in_the_prompt_or_in_the_response(text):
    assert not follows_chat_format("<think>\n" + text)
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
    assert not follows_chat_format(" <think>\na\n</think>\n\nb")


def test_the_scorer_takes_its_template_by_name():
    zero, chat = "<think>a</think><answer>b</answer>", "<think>\na\n</think>\n\nb"
    texts = {"zero": zero, "chat": chat}
    for form, own in texts.items():
        outcomes = [FormatScorer(form).score(text).outcome for text in texts.values()]
        assert outcomes == ["correct" if text == own else "wrong" for text in texts.values()]
    with pytest.raises(ValueError, match="zero, chat, custom"):
        FormatScorer("r1")


def test_every_template_has_its_format():
    assert [*TEMPLATES, "tokenizer"] == [*FORMATS] == list(get_args(DataConfig.model_fields["template"].annotation))
    for template in TEMPLATES:
        spec = scorer_specs(RewardConfig(), ["format"], template)["format"]
        assert FormatScorer(**spec.settings)._follows is FormatScorer(FORMATS[template])._follows
        assert render(template, "q").endswith("<think>\n") == (spec.opening == OPENINGS.get(template) == "<think>\n")
    # What a tokenizer's own template asks for is not known: it has a format only if one is named.
    assert needed_scorers(with_format(RewardConfig(), "tokenizer"), {"math"}) == ["math"]
    assert needed_scorers(with_format(RewardConfig(format="chat"), "tokenizer"), {"math"}) == ["math", "format"]
    for config, template in ((RewardConfig(), "tokenizer"), (RewardConfig(format="none"), "r1_zero")):
        with pytest.raises(RewardError, match="no format to reward: set reward.format"):
            scorer_specs(config, ["format"], template)


PATTERN = r"<think>.*</think>\s*The answer is -?\d+\.?"


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        (PATTERN, "<think>\na\nb\n</think>\n\nThe answer is 12.", True),
        (PATTERN, "<think>\na\n</think>\n\nThe answer is 12. So.", False),
        (PATTERN, "Well, <think>\na\n</think>\n\nThe answer is 12", False),
        ("a|b", "ab", False),
        ("a|b", "b", True),
        ("a$", "a\n", False),
        (".+", "\ud800\u2028\n\x00", True),
        ("求.", "求和", True),
        ("", "", True),
    ],
)
def test_a_pattern_matches_the_whole_response(pattern, text, fits):
    assert FormatScorer("custom", pattern).score(text).score == float(fits)


def test_no_pattern_takes_longer_than_its_response():
    started = time.process_time()
    for hostile in ("(a*)*b", "(a|a)*b", "(a|aa)+$b", r"(.*)(.*)(.*)(.*)x", r"(\w+\s?)*:"):
        assert FormatScorer("custom", hostile).score("a" * 200_000).outcome == "wrong"
    assert time.process_time() - started < patient(2.0)


@pytest.mark.parametrize("pattern", [r"(a)\1", "(?=a)a", "(?<=a)b", "a)(b", "(", "[z-a]", "a{2000}", "\ud800"])
def test_a_pattern_that_needs_to_go_back_is_refused_in_one_line(pattern):
    with pytest.raises(RewardError, match=r"^reward.format_pattern=.* is no regular expression of RE2: ") as error:
        FormatScorer("custom", pattern)
    assert "\n" not in str(error.value)


def test_custom_and_its_pattern_go_together():
    for settings in ({"format": "custom"}, {"format_pattern": "a"}, {"format": "none", "format_pattern": "a"}):
        with pytest.raises(ConfigError, match="go together"):
            RewardConfig(**settings)


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


def test_what_prints_nothing_is_no_content():
    blank = "\u200b\u00ad\u2060\u115f\u3164\uffa0\u2800\ufffc\u0301\ufe0f\ue000\x07\U000e0041\U0001d159\U00013441 \n"
    assert not any(has_visible(character) for character in blank) and not has_visible(blank)
    assert all(has_visible(character) for character in "a1.-$\u6f22\u0394\U0001f600\u2026")
