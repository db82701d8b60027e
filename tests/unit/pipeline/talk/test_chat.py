"""A conversation through a stand-in for the engine: commands, history, what is told, Ctrl-C."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
import traceback
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron_r1.config.data import DataConfig
from megatron_r1.data.tokenizer import train_tokenizer
from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.talk import chat as module
from megatron_r1.pipeline.talk.chat import Terminal, chat, converse
from megatron_r1.pipeline.talk.conversation import TalkConversation
from megatron_r1.types import Rollout, Sampling
from tests.patience import wait_until

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


HOSTILE = "<think>\x1b[2J\x1b]0;title\x07\x9b31m\u202e</think>\r\x1b[?1049h\x08\x7f\u65e5text"


class Typed:
    """`chat` on a terminal of its own, in a fork of this process, with a stand-in for the engine; what is shown is in `shown`."""

    def __init__(self, monkeypatch):
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(module, "open_talk_engine", lambda model: nullcontext(SimpleNamespace(answer=self.answer)))
        self.shown = b""
        self.pid, self.terminal = pty.fork()
        if self.pid == 0:
            self.run()

    def run(self):
        code = 1
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
            config = SimpleNamespace(data=DataConfig(template="r1_chat"), runtime=SimpleNamespace(dtype="fp32"))
            kind = SimpleNamespace(kind="cpu")
            model = SimpleNamespace(folder=Path("m"), config=config, device=kind, context=2000, tokenizer=TOKENIZER)
            chat(model, Sampling(1, 1.0, 1.0, 500), 0)
            code = 0
        except BaseException:  # noqa: BLE001 - or pytest would go on in the fork
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def answer(self, prompt, sampling, seed, go_on):
        ids = TOKENIZER.encode_response(HOSTILE)
        while "forever" in prompt.text:
            time.sleep(0.01)
            if not go_on(TOKENIZER.encode_response("on")):
                return Rollout(ids, np.zeros(len(ids)), "on", False)
        for token in ids:
            go_on([token])
        return Rollout(ids, np.zeros(len(ids)), HOSTILE, True)

    def type(self, keys, *expected):
        """Press keys, and wait until all that is expected was shown, in that order."""
        start = len(self.shown)
        os.write(self.terminal, keys)
        for text in expected:
            wait_until(lambda: self.read() and text in self.shown[start:], 20, f"{text!r} on the terminal")  # noqa: B023
            start += self.shown[start:].index(text) + len(text)

    def read(self):
        """Take what is shown. False: the program has ended."""
        try:
            while select.select([self.terminal], [], [], 0)[0]:
                self.shown += os.read(self.terminal, 4096)
        except OSError:
            return False  # EIO: nobody has the terminal any more
        return True

    def end(self):
        """The exit code of the program that ends."""
        wait_until(lambda: not self.read(), 20, "end of the conversation")
        os.close(self.terminal)
        self.pid, pid = None, self.pid
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def typed(monkeypatch):
    typed = Typed(monkeypatch)
    yield typed
    if typed.pid is not None:
        print(typed.shown)
        os.kill(typed.pid, signal.SIGKILL)
        os.waitpid(typed.pid, 0)


def test_in_a_terminal_keys_stop_and_end_and_a_model_moves_nothing(typed):
    typed.type(b"", b"/help lists commands", b"> ")
    typed.type(b"one\n", b"text", b"> ")
    typed.type(b"forever\n", b"onononon")
    typed.type(b"\x03", b"[stopped]", b"> ")
    typed.type(b"half a line\x03", b"(Ctrl-D ends)", b"> ")
    typed.type(b"\x04")
    assert typed.end() == 0, typed.shown
    assert rb"\x1b[2J\x1b]0;title\x07\x9b31m\u202e" in typed.shown and rb"\r\x1b[?1049h\x08\x7f" in typed.shown
    ours = re.sub(rb"\x1b\[(2m|0m|\?2004[hl])", b"", typed.shown).decode()  # dimmed, plain; readline: lines are pasted whole
    assert not re.search("[^\\t\\r\\n\\x20-\\x7e\u65e5]", ours), ours
    assert b"\x1b[2m<think>" in typed.shown and b"</think>\x1b[0m" in typed.shown
