"""A conversation through a stand-in for the engine: commands, history, what is told, Ctrl-C."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.talk.chat import Terminal, converse
from megatron_r1.pipeline.talk.conversation import TalkConversation
from megatron_r1.types import Rollout, Sampling

TOKENIZER = train_tokenizer(["a few words"], 300)


class Talk:
    """A conversation on questions; `said` goes to the terminal, `notes` beside it, `prompts` to the engine."""

    def __init__(self, *lines, answers=("fine",), interactive=True, styles=False, context=2000, **data):
        self.said, self.notes, self.prompts, self.samplings, self.seeds = "", [], [], [], []
        self.answers = list(answers)
        conversation = TalkConversation(DataConfig(**data), TOKENIZER, self.answer, context)
        terminal = Terminal(iter(lines), self.say, self.notes.append, interactive, styles)
        converse(conversation, terminal, TOKENIZER.decode, Sampling(1, 0.7, 1.0, 50), 5)

    def say(self, text):
        self.said += text

    def answer(self, prompt, sampling, seed, go_on):
        self.prompts.append(prompt.text)
        self.samplings.append(sampling)
        self.seeds.append(seed)
        text = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        given = []
        for token in TOKENIZER.encode_response(text):
            given.append(token)
            if text == "interrupted" and len(given) == 4:
                os.kill(os.getpid(), signal.SIGINT)
            if not go_on([token]):
                return Rollout(given, np.zeros(len(given)), TOKENIZER.decode(given), False)
        finished = len(given) < sampling.max_tokens
        return Rollout(given, np.zeros(len(given)), text, finished)


CHAT = {"template": "r1_chat"}


def test_what_was_said_before_is_in_the_prompt_and_reasoning_is_not():
    talk = Talk("one", "two", "/reset", "three", answers=["<think>hm</think>first", "second", "third"], **CHAT)
    assert talk.said == "<think>hm</think>first\nsecond\nthird\n"
    assert talk.prompts[1].count("one") == 1 and "first" in talk.prompts[1] and "hm" not in talk.prompts[1]
    assert "one" not in talk.prompts[2] and "two" not in talk.prompts[2]
    assert len(set(talk.seeds)) == 3


def test_one_question_templates_ask_each_by_itself():
    talk = Talk("one", "two")
    assert "one" not in talk.prompts[1] and talk.prompts[1].endswith("User: two. Assistant:")


def test_commands():
    talk = Talk("/system Be kind.", "/temperature 0", "/tokens 9", "hello", "/system", "//etc", "/help", "", **CHAT)
    assert talk.prompts[0].startswith("<bos>Be kind.") and "Be kind" not in talk.prompts[1] and "/etc" in talk.prompts[1]
    assert (talk.samplings[0].temperature, talk.samplings[0].max_tokens) == (0.0, 9)
    assert talk.notes[0] == "system message: Be kind." and "/reset" in talk.notes[-1] and len(talk.prompts) == 2


@pytest.mark.parametrize(
    "line", ["/bogus", "/temperature hot", "/temperature -1", "/temperature 2.1", "/temperature nan", "/tokens 0", "/reset now"]
)
def test_a_wrong_command_is_told_and_ends_a_pipe(line):
    talk = Talk(line, "hello", **CHAT)
    assert len(talk.notes) == 1 and line in talk.notes[0] and len(talk.prompts) == 1
    with pytest.raises(ConfigError):
        Talk(line, "hello", interactive=False, **CHAT)


def test_a_system_message_without_a_place_is_told():
    assert "has no place" in Talk("/system x", "hello").notes[0]


def test_a_conversation_that_grew_too_long_is_told():
    talk = Talk("word " * 60, "/reset", "hi", context=100, **CHAT)
    assert "--context is 100" in talk.notes[0] and len(talk.prompts) == 1
    assert talk.samplings[0].max_tokens == 50
    with pytest.raises(DataError):
        Talk("word " * 60, context=100, interactive=False, **CHAT)


def test_ctrl_c_ends_the_answer_and_not_the_conversation():
    talk = Talk("one", "two", answers=["interrupted", "second"], **CHAT)
    assert talk.said == "inte\nsecond\n" and talk.notes == ["[stopped]"] and "inte" in talk.prompts[1]


def test_an_answer_that_is_all_reasoning_is_left_out():
    talk = Talk("one", "two", answers=["<think>never ends", "second"], **CHAT)
    assert "left out" in talk.notes[0] and "one" not in talk.prompts[1]


def test_the_reasoning_that_a_prompt_opens_is_shown_and_counts():
    talk = Talk("one", "two", answers=["so</think>first", "x</think>second"], styles=True, template="r1_chat_think")
    assert talk.said.startswith("\x1b[2m<think>\nso</think>\x1b[0mfirst\n")
    assert "first" in talk.prompts[1] and "so" not in talk.prompts[1]


def test_a_cut_answer_is_told_and_hostile_text_is_harmless():
    talk = Talk("/tokens 2", "one", answers=["\x1b]0;title\x07\r\u202e"], **CHAT)
    assert talk.said == "\\x1b]0;title\\x07\\r\\u202e\n" and talk.notes[0].startswith("[cut after ")
