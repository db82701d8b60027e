"""A tokenizer's own chat template: Jinja text that came with somebody's model, rendered in transformers' sandbox.

What to train on is found by rendering, without knowing the template. For a turn, P is the rendering of the messages before it with
generation prompt, W that of the messages with it, and (B, E) what stands around a stand-in for its content.

    W = P + R and R holds the content      the history is P, the turn is R
    P = B, or B and the opened reasoning   the history is B, the turn is the content and E: the template drops or changes a part of
                                           the content in what it calls the past (R1's does), but it will be generated whole
    else                                   an error: nothing is guessed

The turn is trained up to the first end of sequence after the content.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence

from megatron_r1.data.chat.conversations import Message
from megatron_r1.data.chat.template import Turn
from megatron_r1.data.tokenizer import TAGS, Tokenizer
from megatron_r1.errors import ConfigError, DataError

_STAND_IN = "STAND-IN"
# Unicode noncharacters, which no text holds: one of them splits what may not become a token, and is removed before tokenisation.
_NONCHARACTERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]
# Llama's templates print the date of today unless a date is given; this is the date that they fall back to.
_TODAY = datetime.datetime(2024, 7, 26)


class TokenizerTemplate:
    """`ChatTemplate` of a tokenizer that brings one. The template alone decides about beginning of sequence."""

    def __init__(self, tokenizer: Tokenizer):
        """
        Raises:
            ConfigError: the tokenizer has no chat template.
        """
        if tokenizer.chat_template is None:
            raise ConfigError("data.template=tokenizer, but the tokenizer has no chat_template; choose another data.template")
        self._tokenizer, self._jinja = tokenizer, tokenizer.chat_template
        added = {token for token in tokenizer.added_tokens() if len(token) > 1}
        self._any_token = _at_every_start(added)
        self._no_tag = _at_every_start(added - set(TAGS))

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """See `ChatTemplate`."""
        mark, entries = self._break_up(messages)
        return self._encode(self._render(entries, generation=True), mark)

    def encode_turn(self, messages: Sequence[Message]) -> tuple[list[int], Turn]:
        """See `ChatTemplate`."""
        mark, entries = self._break_up(messages)
        content = entries[-1]["content"]
        prompt, whole = self._render(entries[:-1], generation=True), self._render(entries)
        if whole.startswith(prompt) and content in whole[len(prompt) :]:
            return self._encode(prompt, mark), self._split_turn(self._encode(whole[len(prompt) :], mark))
        stand_in = self._render([*entries[:-1], {"role": "assistant", "content": _STAND_IN}])
        before, found, after = stand_in.rpartition(_STAND_IN)
        if not found or not prompt.startswith(before):
            raise DataError(
                "the tokenizer's chat_template renders an assistant's message in a way that shows neither where it begins nor its "
                "whole content; take data.template=r1_chat, or a template whose generation prompt is the beginning of a turn"
            )
        opened = prompt[len(before) :]
        opened = opened if content.startswith(opened) else ""
        ids = self._encode(opened, mark) + self._encode(content[len(opened) :] + after, mark)
        return self._encode(before, mark), self._split_turn(ids)

    def _break_up(self, messages: Sequence[Message]) -> tuple[str, list[dict[str, str]]]:
        """The messages with a mark inside of everything that would become a token and may not."""
        text = "".join(message.content for message in messages)
        mark = next((character for character in _NONCHARACTERS if character not in text), None)
        if mark is None:
            raise DataError("a conversation holds every Unicode noncharacter from U+FDD0 to U+FDEF, which is not text")
        entries = []
        for message in messages:
            pattern = self._no_tag if message.role == "assistant" else self._any_token
            content = pattern.sub(lambda found: found[0] + mark, message.content)
            entries.append({"role": message.role, "content": content})
        return mark, entries

    def _render(self, entries: list[dict[str, str]], generation: bool = False) -> str:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            rendered, _ = render_jinja_template(
                conversations=[entries],
                chat_template=self._jinja,
                add_generation_prompt=generation,
                bos_token=self._tokenizer.bos or "",
                eos_token=self._tokenizer.eos,
                strftime_now=_TODAY.strftime,
            )
        except (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise DataError(f"the tokenizer's chat_template refuses the conversation: {reason}") from error
        return rendered[0]

    def _encode(self, text: str, mark: str) -> list[int]:
        return [token for part in text.split(mark) if part for token in self._tokenizer.encode_template(part)]

    def _split_turn(self, ids: list[int]) -> Turn:
        if self._tokenizer.eos_id not in ids:
            raise DataError(
                f"the tokenizer's chat_template does not end an assistant's turn with eos_token {self._tokenizer.eos!r}, so the "
                "model would not learn to stop: set eos_token in tokenizer_config.json to the token that ends a turn"
            )
        end = ids.index(self._tokenizer.eos_id) + 1
        return Turn(ids[:end], ids[end:])


def _at_every_start(tokens: set[str]) -> re.Pattern[str]:
    """Matches the first character of every occurrence, also of occurrences that overlap."""
    if not tokens:
        return re.compile(r"(?!)")
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile(f"(?=(?:{'|'.join(map(re.escape, longest_first))})).", re.DOTALL)
