"""`megatron-r1 chat`: questions from a terminal or a pipe, answers as they are sampled."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from io import TextIOWrapper
from typing import TextIO, TypeVar

from megatron_r1.errors import ConfigError, DataError
from megatron_r1.pipeline.talk.conversation import TalkConversation
from megatron_r1.pipeline.talk.engine import open_talk_engine
from megatron_r1.pipeline.talk.model import TalkModel
from megatron_r1.pipeline.talk.text_stream import ReasoningShade, TokenText, show_safely
from megatron_r1.runtime.interrupt import ctrl_c_noted
from megatron_r1.runtime.launch import terminal_has_styles
from megatron_r1.types import MOST_TEMPERATURE, Sampling

HELP = """\
/reset             forget what was said
/system TEXT       another system message, and a new conversation; without TEXT: none
/temperature T     of sampling; 0 takes the likeliest token
/tokens N          most tokens of an answer
/help              this list
Ctrl-C stops an answer, Ctrl-D ends. A question that begins with / is written with //."""
_ASKED = "> "
Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Terminal:
    """Where questions come from and answers go."""

    questions: Iterator[str]  #: ends with the conversation
    say: Callable[[str], object]  #: writes text at once, as it is
    note: Callable[[str], object]  #: writes a line about the conversation
    is_interactive: bool
    has_styles: bool = False


def chat(model: TalkModel, sampling: Sampling, seed: int) -> None:
    """Talk on standard input and output until it ends.

    Raises:
        R1Error: the engine does not start or is lost; from a pipe, also a question that cannot be asked.
    """
    is_interactive = sys.stdin.isatty()

    def note(line: str) -> None:
        print(show_safely(line), file=sys.stderr, flush=True)

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal may lack characters that a model has
    template = model.config.data.template
    note(f"{model.folder}: template {template}, {model.config.runtime.dtype} on {model.device.kind}, {model.context} tokens")
    has_styles = sys.stdout.isatty() and terminal_has_styles()
    terminal = Terminal(_typed() if is_interactive else _piped(sys.stdin), _write_out, note, is_interactive, has_styles)
    with open_talk_engine(model) as engine:
        conversation = TalkConversation(model.config.data, model.tokenizer, engine.answer, model.context)
        if is_interactive:
            note("/help lists commands")
        if conversation.holds_one_question:
            note("r1_zero holds one question: each is asked without those before")
        converse(conversation, terminal, model.tokenizer.decode, sampling, seed)


def converse(
    conversation: TalkConversation, terminal: Terminal, decode: Callable[[list[int]], str], sampling: Sampling, seed: int
) -> None:
    """Answer questions and obey commands until there are no more. What cannot be asked is told, and ends a pipe."""
    for number, line in enumerate(terminal.questions):
        try:
            if line.startswith("/") and not line.startswith("//"):
                sampling = _obey(line, conversation, terminal, sampling)
            elif line.strip():
                _put_question(line.removeprefix("/"), conversation, terminal, decode, sampling, seed + number)
        except (ConfigError, DataError) as error:
            if not terminal.is_interactive:
                raise
            terminal.note(str(error))


def _put_question(
    question: str,
    conversation: TalkConversation,
    terminal: Terminal,
    decode: Callable[[list[int]], str],
    sampling: Sampling,
    seed: int,
) -> None:
    shade, text = ReasoningShade(terminal.has_styles), TokenText(decode)
    stoppable: AbstractContextManager[list[float]] = ctrl_c_noted() if terminal.is_interactive else nullcontext([])
    with stoppable as pressed:

        def hear(opening: str, token_ids: list[int]) -> bool:
            terminal.say(shade.add(opening + text.add(token_ids)))
            return not pressed

        try:
            rollout, is_kept = conversation.ask(question, sampling, seed, hear)
        finally:
            terminal.say(shade.add(text.add([], is_last=True)) + shade.end() + "\n")
    if pressed:
        terminal.note("[stopped]")
    elif not rollout.finished:
        terminal.note(f"[cut after {len(rollout.token_ids)} tokens]")
    if not is_kept and not conversation.holds_one_question:
        terminal.note("[no answer after the reasoning: left out of the conversation]")


def _obey(line: str, conversation: TalkConversation, terminal: Terminal, sampling: Sampling) -> Sampling:
    """Raises ConfigError for a command that is none."""
    name, _, rest = line.strip().partition(" ")
    rest = rest.strip()
    if name == "/system":
        conversation.set_system(rest or None)
        terminal.note(f"system message: {rest}" if rest else "no system message")
        return sampling
    if name == "/temperature":
        return replace(sampling, temperature=_number_of(name, rest, float, 0.0, MOST_TEMPERATURE))
    if name == "/tokens":
        return replace(sampling, max_tokens=_number_of(name, rest, int, 1, 1 << 31))
    if rest or name not in ("/reset", "/help"):
        raise ConfigError(f"{line.strip()}: no such command; /help lists them")
    if name == "/reset":
        conversation.reset()
    else:
        terminal.note(HELP)
    return sampling


def _number_of(command: str, text: str, kind: Callable[[str], Number], least: Number, most: Number) -> Number:
    try:
        value = kind(text)
    except ValueError:
        value = kind("-1")
    if not least <= value <= most:
        raise ConfigError(f"{command} {text}: give a number from {least} to {most}")
    return value


def _typed() -> Iterator[str]:
    """What somebody types, with the editing and the history of readline. Ctrl-C leaves the line, Ctrl-D ends."""
    try:
        import readline  # noqa: F401 - `input` uses it once it is loaded
    except ImportError:
        pass
    while True:
        try:
            yield input(_ASKED)
        except EOFError:
            print(flush=True)
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D ends)", flush=True)


def _piped(stream: TextIO) -> Iterator[str]:
    """The lines of a pipe or a file. Raises DataError for what is no text."""
    number = 0
    try:
        for number, line in enumerate(stream, start=1):
            yield line.rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise DataError(f"standard input, after line {number}: not UTF-8 text ({error.reason})") from None


def _write_out(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()
