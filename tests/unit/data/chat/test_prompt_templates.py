import pytest

from megatron_r1.data.chat.load import load_chat_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import TEMPLATES, fixed_texts, render, split_prompt
from megatron_r1.data.tally.tokenizer import train_tally_tokenizer
from megatron_r1.errors import ConfigError

# arXiv 2501.12948v1 Table 1, copied from the paper, not from the code.
TABLE_1 = """A conversation between User and Assistant. The user asks a question, and the Assistant solves it.
The assistant first thinks about the reasoning process in the mind and then provides the user
with the answer. The reasoning process and answer are enclosed within <think> </think> and
<answer> </answer> tags, respectively, i.e., <think> reasoning process here </think>
<answer> answer here </answer>. User: prompt. Assistant:"""


def test_the_r1_zero_template_is_word_for_word():
    assert render("r1_zero", "prompt") == " ".join(TABLE_1.split())


def test_the_chat_template_has_no_space_anywhere():
    assert render("r1_chat", "Hi there.") == "<｜User｜>Hi there.<｜Assistant｜>"
    assert render("r1_chat_think", "Hi there.") == "<｜User｜>Hi there.<｜Assistant｜><think>\n"


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", ["What is 1+1?", "{question} {0} %s", "求1+1？", "User: x. Assistant:"])
def test_the_parts_join_to_the_rendered_text(template, question):
    parts = split_prompt(template, question)
    assert "".join(parts) == render(template, question)
    assert (parts[0], parts[2]) == fixed_texts(template)
    assert parts[1].lstrip(" ") == question


def test_an_unknown_template_is_named():
    with pytest.raises(ConfigError, match="'r2'.*r1_zero, r1_chat"):
        render("r2", "x")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_vocabulary_made_for_a_template_holds_its_markers(template):
    tokenizer = train_tally_tokenizer(template=template)
    ids = tokenizer.encode_prompt(template, "first 12")[1]
    assert ids == load_chat_template(template, tokenizer).encode_prompt([Message("user", "first 12")])
    assert tokenizer.decode(ids).removesuffix("<think>\n") == render(template.removesuffix("_think"), "first 12")
    assert len(ids) == 3 + len(tokenizer.encode_plain(split_prompt(template, "first 12")[1])) + 2 * template.endswith("_think")
