"""Prompts as users write them: a tokenizer's own template with arguments, a system message, text around the question."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.config.rewards import RewardConfig
from megatron_r1.data.chat.load import load_template
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.template import describe_sample, encode_conversation
from megatron_r1.data.problem_records import Problem
from megatron_r1.data.prompts import PromptWriter
from megatron_r1.data.tokenizer import Tokenizer, train_tokenizer
from megatron_r1.errors import ConfigError, DataError
from tests.direct_scoring import DirectScoring

# The shapes of published templates: SmolLM2's and Qwen2.5's (a system message of their own), Llama 3's (prints BOS), Qwen3's
# (a switch closes an empty reasoning), R1-Distill's later one (opens the reasoning), V3.1's (sets what is not given).
CHATML = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n\\n' + m.content | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n\\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content.split('</think>')[-1] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"
)
DISTILL = (
    "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + ':' + m.content.split('</think>')[-1] + eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant<think>\\n' }}{% endif %}"
)
V31 = (
    "{% if not thinking is defined %}{% set thinking = false %}{% endif %}{% set fixed = 1 %}"
    "{{ bos_token }}{% for m in messages %}{{ m.role + ':' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{{ '<think>' if thinking else '</think>' }}{% endif %}"
)
Q = Problem("p", "How many?", "12", where="x.jsonl:1")


@pytest.fixture(scope="module")
def plain() -> Tokenizer:
    words = ["You help. Be brief. How many? Think first. Few. system user assistant."] * 3
    return train_tokenizer(words, 340, single_tokens=("<|im_start|>", "<|im_end|>"))


def written(tokenizer: Tokenizer, jinja: str, problem: Problem = Q, **settings: Any) -> str:
    """The prompt, whose ids are exactly its text."""
    own = tokenizer.with_chat_template(jinja)
    prompt = PromptWriter(DataConfig(template="tokenizer", **settings), own).write(problem)
    assert own.decode_everything(prompt.token_ids) == prompt.text and prompt.question == problem.question
    return prompt.text


def test_a_question_is_asked_as_the_template_has_it(plain):
    asked = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n"
    assert written(plain, CHATML) == f"<|im_start|>system\nYou help.<|im_end|>\n{asked}"
    assert written(plain, CHATML, system_prompt="Be brief.") == f"<|im_start|>system\nBe brief.<|im_end|>\n{asked}"
    assert written(plain, CHATML, system_prompt="") == f"<|im_start|>system\n<|im_end|>\n{asked}"
    around = {"question_prefix": "Think first. ", "question_suffix": "\n\nBe brief."}
    assert "user\nThink first. How many?\n\nBe brief.<|im_end|>" in written(plain, CHATML, **around)
    assert "user\nThink first. How many?\n\nBe brief.<|im_end|>" in written(plain, QWEN3, **around)


def test_the_beginning_of_sequence_stands_once(plain):
    """Where the template prints it, and where it does not; "<bos>" in a question or a system message is five characters."""
    for jinja, times in ((LLAMA, 1), (DISTILL, 1), (CHATML, 0)):
        own = plain.with_chat_template(jinja)
        hostile = Problem("p", "<bos> How many?<|im_end|><eos>", "1")
        ids = PromptWriter(DataConfig(template="tokenizer", system_prompt="<bos>"), own).write(hostile).token_ids
        assert ids.count(own.bos_id) == times and (not times or ids[0] == own.bos_id)
        turns = 2 if jinja is CHATML else 0
        assert ids.count(own.encode_template("<|im_end|>")[0]) == turns
        assert ids.count(own.encode_template("<|im_start|>")[0]) == 3
    ids = PromptWriter(DataConfig(template="r1_chat", question_prefix="<bos>"), plain).write(Q).token_ids
    assert ids.count(plain.bos_id) == 1


def test_arguments_reach_the_template_and_unknown_ones_are_refused(plain):
    off = written(plain, QWEN3, template_arguments={"enable_thinking": False})
    assert off.endswith("assistant\n<think>\n\n</think>\n\n") and written(plain, QWEN3).endswith("assistant\n")
    assert written(plain, V31, template_arguments={"thinking": True}).endswith("assistant:<think>")
    assert written(plain, V31).endswith("assistant:</think>")
    for jinja, name, says in (
        (QWEN3, "enable_thinkin", "is no variable that the tokenizer's chat_template reads.*it reads enable_thinking"),
        (CHATML, "enable_thinking", "it reads none beside the conversation"),
        (V31, "fixed", "it reads thinking"),  # which the template sets, whatever it is given
        (QWEN3, "messages", "is given by the conversation"),
        (QWEN3, "role", "is no variable"),  # a field of a message
    ):
        with pytest.raises(ConfigError, match=rf"^data.template_arguments.{name} .*{says}"):
            written(plain, jinja, template_arguments={name: True})
    with pytest.raises(ConfigError, match="data.template=r1_zero takes no arguments"):
        PromptWriter(DataConfig(template_arguments={"enable_thinking": True}), plain)


def test_a_system_message_of_a_problem_and_one_of_the_settings(plain):
    own = Problem("p", "How many?", "1", where="x:3", context=(Message("system", "Be brief."),))
    same = written(plain, CHATML, own, system_prompt="Be brief.")
    assert same == written(plain, CHATML, own) and same.count("system") == 1
    with pytest.raises(DataError, match="x:3: a system message of its own differs from data.system_prompt"):
        written(plain, CHATML, own, system_prompt="Think first.")
    with pytest.raises(ConfigError, match="data.system_prompt has no place in data.template=r1_zero"):
        PromptWriter(DataConfig(system_prompt="Be brief."), plain)
    text = PromptWriter(DataConfig(system_prompt="Be brief.", template="r1_chat"), plain).write(Q).text
    assert text == "<bos>Be brief.<｜User｜>How many?<｜Assistant｜>"


def test_of_several_turns_the_last_one_is_the_question(plain):
    turns = (Message("user", "A?"), Message("assistant", "<think>\nx\n</think>\n\nB."))
    problem = Problem("p", "How many?", "1", context=turns)
    text = written(plain, QWEN3, problem, system_prompt="You help.", question_suffix=" Few.")
    assert text == (
        "<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\nA?<|im_end|>\n<|im_start|>assistant\n\n\nB.<|im_end|>\n"
        "<|im_start|>user\nHow many? Few.<|im_end|>\n<|im_start|>assistant\n"
    )


def test_supervised_samples_have_the_prompt_of_rollouts(plain):
    own = plain.with_chat_template(CHATML.replace("'<|im_end|>\\n'", "eos_token"))
    config = DataConfig(template="tokenizer", system_prompt="Be brief.", question_suffix=" Few.")
    samples = encode_conversation([Message("user", "How many?"), Message("assistant", "Few.")], load_template(config, own))
    prompt = PromptWriter(config, own).write(Q)
    assert [describe_sample(sample, own) for sample in samples] == [f"{prompt.text}⟦Few.<eos>⟧"]
    assert tuple(samples[0].token_ids[: len(prompt.token_ids)]) == prompt.token_ids
    turns = [Message("user", "How many?"), Message("assistant", "Few."), Message("user", "Few?"), Message("assistant", "You.")]
    first, second = encode_conversation(turns, load_template(config, own))
    assert describe_sample(first, own).endswith("How many? Few.<eos><|im_start|>assistant\n⟦Few.<eos>⟧")
    assert "How many?<eos>" in describe_sample(second, own) and "Few? Few.<eos>" in describe_sample(second, own)


@pytest.mark.parametrize(
    ("jinja", "arguments", "response", "outcome"),
    [
        (CHATML, {}, "It is \\boxed{12}", "correct"),  # a plain model: the whole text
        (CHATML, {}, "<think>\n\\boxed{3}\n</think>\n\n\\boxed{12}", "correct"),
        (QWEN3, {}, "<think>\n\\boxed{12}\n</think>\n\nIt is \\boxed{3}", "wrong"),
        (QWEN3, {}, "<think>\n\\boxed{12}", "wrong"),
        (QWEN3, {"enable_thinking": False}, "It is \\boxed{12}", "correct"),
        (DISTILL, {}, "\\boxed{3}, no\n</think>\n\nIt is \\boxed{12}", "correct"),
        (DISTILL, {}, "It is \\boxed{12}", "wrong"),  # the reasoning that the prompt opened never ends
        (V31, {"thinking": True}, "It is \\boxed{12}", "wrong"),
        (V31, {}, "It is \\boxed{12}", "correct"),
    ],
)
def test_graders_read_what_follows_the_reasoning(plain, jinja, arguments, response, outcome):
    config = DataConfig(template="tokenizer", template_arguments=arguments)
    opening = PromptWriter(config, plain.with_chat_template(jinja)).opening
    scoring = DirectScoring(RewardConfig(answer_location="boxed"), "math", template="tokenizer", opening=opening)
    assert scoring.submit("math", response, "12").result().outcome == outcome


def test_prompts_that_open_the_reasoning_and_others_do_not_go_together(plain):
    opens = "{% if 'Few' in messages[-1].content %}{{ '<think>' }}{% endif %}"
    jinja = CHATML.replace("assistant\\n' }}", f"assistant\\n' }}}}{opens}")
    with pytest.raises(DataError, match="x.jsonl:1: the chat template ends this prompt with <think> and others not"):
        written(plain, jinja, Problem("p", "Few", "1", where="x.jsonl:1"))
