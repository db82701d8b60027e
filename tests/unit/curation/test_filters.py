"""The filters of supervised data, one at a time, and the forms of an answer."""

from __future__ import annotations

import pytest

from megatron_r1.config.curation import CurationConfig, FilterConfig
from megatron_r1.curation.filters import FILTERS, Rejection, first_failure
from megatron_r1.curation.forms import Answer, Form, read_sample
from megatron_r1.curation.records import Conversation

THINK = Form()
GOOD = "I need the sum of both numbers, so let me add them.\n\nThree plus four makes seven, and seven minus four is three again."
ALL = FilterConfig(names=list(FILTERS))


def fail(reasoning: str | None = GOOD, summary: str = "The sum is seven.", config: FilterConfig = ALL, **named) -> Rejection | None:
    fields = named.pop("fields", {"outcome": "correct"})
    named = {"domain": "math", "language": "en"} | named
    question = "What is the sum of three and four?"
    return first_failure(
        Conversation.of_turn("1", question, THINK.join(Answer(reasoning, summary)), fields=fields, **named), config, THINK
    )


def name_of(**named) -> str | None:
    rejection = fail(**named)
    return rejection and rejection.name


def test_a_good_record_passes_every_filter():
    assert fail() is None
    assert fail("我先把两个数字加起来。\n\n三加四等于七，验证一下也没有问题。", "答案是七。", language="zh") is None


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"reasoning": "No end <think> of it", "summary": "x"}, "well_formed"),
        ({"reasoning": None}, "well_formed"),
        ({"fields": {"outcome": "wrong"}}, "correct"),
        ({"fields": {"outcome": "timeout"}}, "correct"),
        ({"fields": {}}, "correct"),
        ({"reasoning": GOOD + " 然后我们把这两个数字加起来得到七"}, "language"),
        ({"summary": "答案是七，因为三加四等于七。"}, "language"),
        ({"language": "xx"}, "language"),
        ({"reasoning": GOOD + " and then it went on and on and round and round the same small place" * 8}, "repetition"),
        ({"reasoning": GOOD + "\n" + "\n".join(["Wait, that is wrong."] * 20)}, "repetition"),
        ({"reasoning": GOOD + " " + " ".join(f"Then I add {n} to it." for n in range(90))}, "long_paragraph"),
        ({"reasoning": GOOD + "\n```python\nprint(3 + 4)\n```"}, "code_block"),
        ({"reasoning": "# Plan\n\n" + GOOD}, "markdown"),
        ({"reasoning": GOOD + " It is **seven**."}, "markdown"),
        ({"reasoning": GOOD + "\n\n- first this\n- then that"}, "markdown"),
        ({"reasoning": GOOD + "\n\n| a | b |\n| --- | --- |\n"}, "markdown"),
        ({"reasoning": "The sum of the numbers has to be found. Three plus four makes seven."}, "first_person"),
    ],
)
def test_each_filter_drops_what_it_is_for_and_names_itself(changes, name):
    assert name_of(**changes) == name
    others = FilterConfig(names=[other for other in FILTERS if other != name])
    assert name_of(**changes, config=others) != name


@pytest.mark.parametrize(
    "reasoning",
    [
        "I take 2**3 and then 3 ** 2, which is 8 * 9 = 72 of them.\n- 5 + 77 gives me the same.",
        "Let me see: |x - 3| < 4 means that x is between them.\n#5 is the smallest.",
    ],
)
def test_arithmetic_is_no_markdown(reasoning):
    assert name_of(reasoning=reasoning) is None


def test_an_answer_without_reasoning_or_verdict_is_for_plain_domains():
    assert name_of(reasoning=None, domain="general", fields={}) is None
    assert name_of(domain="general", fields={"outcome": "wrong"}) == "correct"


def test_an_unknown_language_is_the_question_s_own_and_parts_without_words_are_in_none():
    assert name_of(language="") is None
    assert name_of(language="", summary="答案是七，因为三加四等于七。") == "language"
    assert name_of(summary=r"\boxed{7}") is None


def test_one_word_in_the_same_script_may_be_a_name_but_two_are_another_language():
    assert name_of(summary="Fine.") is None
    assert name_of(summary="Das ist sieben.") == name_of(summary="好的。") == "language"


def test_the_first_failing_filter_is_named_for_any_turn():
    config = FilterConfig()
    messages = Conversation.of_turn("1", "One?", "Fine.", language="en").messages
    bad = Conversation.of_turn("1", "Two?", "好的，这是一个很好的问题。", language="en").messages
    assert first_failure(Conversation("1", messages + bad, "general", "en"), config, THINK).name == "language"
    assert first_failure(Conversation("1", messages + messages, "general", "en"), config, THINK) is None


@pytest.mark.parametrize("form", [THINK, Form("|special_token|")])
def test_a_form_splits_what_it_joins_and_nothing_else(form):
    for answer in (Answer("a\n\nb", "c\nd"), Answer(None, "hello")):
        assert form.split(form.join(answer)) == answer
    assert form.split(form.join(Answer(" ", "x"))) is None and form.split(form.join(Answer("x", ""))) is None
    assert form.split(form.join(Answer(form.join(Answer("a", "b")), "c"))) is None
    assert form.split(" ") is None


def test_the_special_token_form_is_that_of_v1():
    form = Form.of(CurationConfig(form="special_token"))
    assert form.join(Answer("r", "s")) == "|special_token|r|special_token|s"
    assert THINK.join(Answer("r", "s")) == "<think>\nr\n</think>\n\ns"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think> r </think> <answer> 7 </answer>", Answer("r", "It is 7.")),
        ("<think>\nr\n</think>\n\nThe sum is 7.", Answer("r", "The sum is 7.")),
        ("r\n</think>\n\ns", Answer("r", "s")),  # the prompt had opened it
        ("r </think> <answer>7</answer>", Answer("r", "It is 7.")),
        ("<think>r</think>", None),
        ("<think>r</think> <answer> </answer>", None),
        ("<think>r</think> <answer>7</answer> and more", None),
        ("<think>r <answer>7</answer></think> <answer>7</answer>", None),
        ("<think>r</think> s </think> t", None),
        ("so <think>r</think> s", None),
        ("no reasoning", None),
        ("<think> never ends", None),
    ],
)
def test_samples_are_read_in_any_template_s_form(response, answer):
    assert read_sample(response, "It is {answer}.") == answer
