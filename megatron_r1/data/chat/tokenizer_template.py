"""A tokenizer's own chat template: Jinja text that came with somebody's model, rendered in transformers' sandbox.

What to train on is found by rendering, without knowing the template. For a turn, P is the rendering of the messages before it with
generation prompt, W that of the messages with it, and (B, E) what stands around a stand-in for its content. A turn with reasoning
is rendered with the template's switch for it on, if there is one (`thinking`, `enable_thinking`).

    W = P + R and R holds the content      the history is P, the turn is R; a <think> that P opened need not stand in R again
    P = B, or B and the opened reasoning   the template drops or changes a part of the content in what it calls the past (R1's
                                           does), but it will be generated whole: the turn is the content and E. The history is
                                           B; P, if the content goes on after the <think> that P opened (it has only </think>)
    P = B' and the opened reasoning        the same, where B is B' and a </think> for replies without reasoning (V3.1's)
    else                                   an error: nothing is guessed

The turn is trained up to the first end of sequence after the content. What the template drops of the other messages, of tools and
of tool calls is an error, too.
"""

from __future__ import annotations

import datetime
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_r1.data.chat.cut_off import TookTooLong, cut_off
from megatron_r1.data.chat.messages import Message, with_text_arguments
from megatron_r1.data.chat.template import Turn, goes_on_thinking
from megatron_r1.data.tokenizer import TAGS, Tokenizer
from megatron_r1.errors import ConfigError, DataError, one_line
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

_STAND_IN = "STAND-IN"
# Unicode noncharacters, which no text holds: one of them splits what may not become a token, and is removed before tokenisation.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Llama's templates print the date of today unless a date is given; this is the date that they fall back to.
_TODAY = datetime.datetime(2024, 7, 26)
_LONGEST_SECONDS = 10.0  # of processor time for one rendering, which takes milliseconds
#: what a rendering gets in any case
_GIVEN = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "bos_token", "eos_token", "strftime_now",
    "raise_exception", "conversations", "chat_template", "return_assistant_tokens_mask",
}  # fmt: skip
_GENERATION = re.compile(r"\{%-?\s{0,9}(?:end)?generation\s{0,9}-?%\}")
_SWITCHES = {"thinking": True, "enable_thinking": True}
_OPENED = re.compile(rf"{THINK_OPEN}\s*\Z")
_CLOSED = re.compile(rf"(?:{THINK_OPEN}\s*)?{THINK_CLOSE}\s*\Z")
_THINK = re.compile(rf"\s*({THINK_OPEN}|{THINK_CLOSE})\s*")
_PARSES_CONTENT = re.compile(rf"split\(\s*['\"]{THINK_CLOSE}")


@dataclass(frozen=True)
class _Asked:
    """A conversation as a template takes it, with a mark inside of everything that would become a token and may not."""

    mark: str
    entries: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None

    def until(self, end: int) -> _Asked:
        """Its first messages."""
        return _Asked(self.mark, self.entries[:end], self.tools)


class TokenizerTemplate:
    """`ChatTemplate` of a tokenizer that brings one. The template alone decides about beginning of sequence."""

    def __init__(self, tokenizer: Tokenizer, arguments: Mapping[str, Any] | None = None):
        """
        Args:
            arguments: for every rendering, beside the messages; they count more than the switch for reasoning.

        Raises:
            ConfigError: the tokenizer has no chat template, or the template does not read an argument.
        """
        if tokenizer.chat_template is None:
            raise ConfigError("data.template=tokenizer, but the tokenizer has no chat_template; choose another data.template")
        self._tokenizer, self._jinja = tokenizer, tokenizer.chat_template
        _refuse_powers(self._jinja)
        self._arguments = dict(arguments or {})
        _check_arguments(self._jinja, self._arguments)
        self._wants_reasoning_apart = "reasoning_content" in self._jinja and not _PARSES_CONTENT.search(self._jinja)
        added = {token for token in tokenizer.added_tokens() if len(token) > 1}
        self._any_token = _at_every_start(added)
        self._no_tag = _at_every_start(added - set(TAGS))

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """See `ChatTemplate`."""
        asked = self._break_up(messages, tools)
        rendered = self._render(asked, generation=True)
        _check_used(asked, rendered)
        return self._encode(rendered, asked.mark)

    def encode_turn(self, messages: Sequence[Message], tools: str = "") -> tuple[list[int], Turn]:
        """See `ChatTemplate`."""
        asked = self._break_up(messages, tools)
        mark, before_it = asked.mark, asked.until(-1)
        content = self._no_tag.sub(lambda found: found[0] + mark, messages[-1].content)
        thinks = THINK_CLOSE in content
        prompt, whole = self._render(before_it, generation=True, thinks=thinks), self._render(asked, thinks=thinks)
        _check_used(asked, whole)
        opened = _opened_by(prompt)
        for history in (prompt, prompt.removesuffix(opened)) if opened else (prompt,):
            wanted = content.removeprefix(THINK_OPEN) if history is prompt and opened else content
            if whole.startswith(history) and _squeeze(wanted) in _squeeze(whole[len(history) :]):
                return self._encode(history, mark), self._split_turn(self._encode(whole[len(history) :], mark, False))
        if messages[-1].tool_calls:
            raise _unclear()
        last = {"role": "assistant", "content": _STAND_IN}
        stand_in = self._render(_Asked(mark, [*before_it.entries, last], asked.tools), thinks=thinks)
        before, found, after = stand_in.rpartition(_STAND_IN)
        if not found:
            raise _unclear()
        if not prompt.startswith(before):
            before = _CLOSED.sub("", before)
            if not prompt.startswith(before) or not _OPENED.fullmatch(prompt[len(before) :]):
                raise _unclear()
        elif thinks and _CLOSED.search(before):
            raise DataError(
                f"the tokenizer's chat_template ends every prompt with {THINK_CLOSE}, so that a reply with reasoning has no place; "
                "take a template that opens the reasoning"
            )
        opened = prompt[len(before) :]
        is_repeated = bool(opened) and content.startswith(opened)
        goes_on = _OPENED.fullmatch(opened) and goes_on_thinking(content)
        if goes_on or (THINK_CLOSE in opened and not thinks):
            before, opened = prompt, ""
        elif not is_repeated:
            opened = ""
        ids = self._encode(opened, mark, False) + self._encode(content[len(opened) :] + after, mark, False)
        return self._encode(before, mark), self._split_turn(ids)

    def end_of_turn(self) -> int | None:
        """The first added token, not a tag, that the template puts after a reply; None without one, or if it renders no reply."""
        asked = self._break_up([Message("user", "?"), Message("assistant", _STAND_IN)], "")
        try:
            _, found, after = self._render(asked).rpartition(_STAND_IN)
        except DataError:
            return None
        ends = [id for id in self._encode(after, asked.mark, False) if self._tokenizer.is_marker(id)] if found else []
        return ends[0] if ends else None

    def _break_up(self, messages: Sequence[Message], tools: str) -> _Asked:
        text = "".join(part for message in messages for part in (message.content, message.tool_calls, message.name)) + tools
        mark = next((character for character in _NONCHARACTERS if character not in text), None)
        if mark is None:
            raise DataError("a conversation holds every Unicode noncharacter from U+FDD0 to U+FDEF, which is not text")

        def broken(text: str, tokens: re.Pattern[str]) -> str:
            return tokens.sub(lambda found: found[0] + mark, text)

        entries: list[dict[str, Any]] = []
        for message in messages:
            is_assistant = message.role == "assistant"
            content = broken(message.content, self._no_tag if is_assistant else self._any_token)
            entry: dict[str, Any] = {"role": message.role, "content": content}
            if is_assistant and self._wants_reasoning_apart and content.count(THINK_CLOSE) == 1:
                reasoning, _, content = content.partition(THINK_CLOSE)
                reasoning = reasoning.strip().removeprefix(THINK_OPEN).strip()
                entry |= {"reasoning_content": reasoning, "content": content.strip()}
            if message.tool_calls:
                entry["tool_calls"] = json.loads(broken(message.tool_calls, self._any_token))
            for name in ("name", "tool_call_id"):
                if value := getattr(message, name):
                    entry[name] = broken(value, self._any_token)
            entries.append(entry)
        if tools and not re.search(r"\btools\b", self._jinja):
            raise DataError("the tokenizer's chat_template has no place for tools, which the conversation has")
        return _Asked(mark, entries, json.loads(broken(tools, self._any_token)) if tools else None)

    def _render(self, asked: _Asked, generation: bool = False, thinks: bool = False) -> str:
        """The text. Arguments of tool calls are objects; text for a template that puts texts together."""
        try:
            rendered = self._render_once(asked, generation, thinks)
            if not any(repr(arguments) in rendered for arguments in _call_arguments(asked)):
                return rendered  # no dict in Python's own spelling
        except DataError:
            if not _call_arguments(asked):
                raise
        entries = [
            {**entry, "tool_calls": [with_text_arguments(call) for call in entry["tool_calls"]]} if "tool_calls" in entry else entry
            for entry in asked.entries
        ]
        return self._render_once(_Asked(asked.mark, entries, asked.tools), generation, thinks)

    def _render_once(self, asked: _Asked, generation: bool, thinks: bool) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with cut_off(_LONGEST_SECONDS):
                rendered, _ = render_jinja_template(
                    conversations=[asked.entries],
                    tools=asked.tools,
                    chat_template=self._jinja,
                    add_generation_prompt=generation,
                    bos_token=self._tokenizer.bos or "",
                    eos_token=self._tokenizer.eos,
                    strftime_now=_TODAY.strftime,
                    **((_SWITCHES if thinks else {}) | self._arguments),
                )
        except (TookTooLong, RecursionError, MemoryError) as error:
            raise DataError(
                f"the tokenizer's chat_template does not end ({one_line(error)}); choose another data.template"
            ) from None
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"the tokenizer's chat_template refuses the conversation: {reason}") from error
        return rendered[0]

    def _encode(self, text: str, mark: str, begins: bool = True) -> list[int]:
        ids: list[int] = []
        for part in filter(None, text.split(mark)):
            ids += self._tokenizer.encode_template(part, begins and not ids)
        return ids

    def _split_turn(self, ids: list[int]) -> Turn:
        if self._tokenizer.eos_id not in ids:
            raise DataError(
                f"the tokenizer's chat_template does not end an assistant's turn with eos_token {self._tokenizer.eos!r}, so the "
                "model would not learn to stop: set eos_token in tokenizer_config.json to the token that ends a turn"
            )
        end = ids.index(self._tokenizer.eos_id) + 1
        return Turn(ids[:end], ids[end:])


def _refuse_powers(template: str) -> None:
    """Raises ConfigError for a template with a power, one of which can compute for ever where no limit reaches."""
    from jinja2 import Environment, TemplateError

    try:
        tokens = [token for token in Environment().lex(template) if token[1] not in ("whitespace", "data")]
    except TemplateError:
        return  # the first rendering tells it
    for (_, _, before), (line, kind, value) in itertools.pairwise(tokens):
        if kind == "operator" and value == "**" and before not in ("(", ","):  # there it stands for named arguments
            raise ConfigError(f"line {line} of the tokenizer's chat_template computes a power: choose another data.template")


def _check_arguments(template: str, arguments: Mapping[str, Any]) -> None:
    """Raises ConfigError for an argument that would change nothing, since the template reads no such variable from outside."""
    from jinja2 import Environment, TemplateError
    from jinja2.meta import find_undeclared_variables

    if not arguments:
        return
    try:  # the tags that transformers adds mark a part of the text, and read nothing
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateError:
        return  # the first rendering tells it
    read = find_undeclared_variables(parsed) - _GIVEN
    if wrong := sorted(set(arguments) - read):
        does = "is given by the conversation" if wrong[0] in _GIVEN else "is no variable that the tokenizer's chat_template reads"
        known = f"it reads {', '.join(sorted(read))}" if read else "it reads none beside the conversation"
        raise ConfigError(f"data.template_arguments.{wrong[0]} {does}: drop it, or correct the name; {known}")


def _check_used(asked: _Asked, rendered: str) -> None:
    """Raises DataError if the template leaves out a message that is not the assistant's, or a tool call."""
    for entry in asked.entries:
        lines = [line.strip() for line in entry["content"].splitlines() if line.strip()] if entry["role"] != "assistant" else []
        if lines and not any(line in rendered or json.dumps(line, ensure_ascii=False)[1:-1] in rendered for line in lines):
            raise DataError(f"the tokenizer's chat_template leaves out a message of role {entry['role']!r}: it has no place for it")
        for call in entry.get("tool_calls", []):
            if call["function"]["name"] not in rendered:
                raise DataError("the tokenizer's chat_template leaves out a tool call: it has no place for tool_calls")


def _call_arguments(asked: _Asked) -> list[dict]:
    """Of all tool calls those that Python and JSON spell differently."""
    found = [call["function"]["arguments"] for entry in asked.entries for call in entry.get("tool_calls", [])]
    return [arguments for arguments in found if isinstance(arguments, dict) and arguments]


def _opened_by(prompt: str) -> str:
    found = _OPENED.search(prompt)
    return found[0] if found else ""


def _squeeze(text: str) -> str:
    """Without the space around <think> and </think>, which templates set as they like."""
    return _THINK.sub(r"\1", text).strip()


def _unclear() -> DataError:
    return DataError(
        "the tokenizer's chat_template renders an assistant's message in a way that shows neither where it begins nor its "
        "whole content; take data.template=r1_chat, or a template whose generation prompt is the beginning of a turn"
    )


def _at_every_start(tokens: set[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence, also of occurrences that overlap."""
    if not tokens:
        return re.compile(r"(?!)")
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, longest_first))})).", re.DOTALL)
