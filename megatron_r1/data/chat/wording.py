"""What the settings put around every question: a system message, and text before and after it in the user's message."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_r1.config.data import DataConfig
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.template import ChatTemplate, Turn
from megatron_r1.errors import DataError


@dataclass(frozen=True)
class Wording:
    """`data.system_prompt`, `data.question_prefix` and `data.question_suffix`."""

    system: str | None = None
    prefix: str = ""
    suffix: str = ""

    @classmethod
    def of(cls, config: DataConfig) -> Wording:
        """That of the settings."""
        return cls(config.system_prompt, config.question_prefix, config.question_suffix)

    def surround(self, question: str) -> str:
        """The question with the text before and after it."""
        return f"{self.prefix}{question}{self.suffix}"

    def apply(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as they are asked: the question is the last one of the user.

        Raises:
            DataError: the messages have another system message.
        """
        worded = list(messages)
        asked = max((index for index, message in enumerate(worded) if message.role == "user"), default=None)
        if asked is not None:
            worded[asked] = replace(worded[asked], content=self.surround(worded[asked].content))
        if self.system is None:
            return worded
        own = [message.content for message in worded if message.role == "system"]
        if own and own != [self.system]:
            raise DataError("a system message of its own differs from data.system_prompt: remove one of the two")
        return worded if own else [Message("system", self.system), *worded]


class WordedTemplate:
    """A `ChatTemplate` whose questions have a wording, in training as in prompts."""

    def __init__(self, template: ChatTemplate, wording: Wording):
        self._template, self._wording = template, wording

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """See `ChatTemplate`."""
        return self._template.encode_prompt(self._wording.apply(messages), tools)

    def encode_turn(self, messages: Sequence[Message], tools: str = "") -> tuple[list[int], Turn]:
        """See `ChatTemplate`."""
        return self._template.encode_turn(self._wording.apply(messages), tools)
