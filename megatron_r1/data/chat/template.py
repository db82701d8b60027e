"""Conversations as token ids: what a chat template puts around the messages, and which tokens the assistant is trained on.

Every template answers two questions in ids, the history before an assistant's turn and the turn itself, each tokenised as it will
be when the model is asked: the history as a prompt, the turn as what follows it. From these, `encode_conversation` makes training
samples for any template.

Untrusted text never becomes a control token: a user's "<｜Assistant｜>" or "</think>" is characters, in an assistant's message only
<think>, <answer> and their ends are tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from megatron_r1.data.chat.messages import Message
from megatron_r1.data.chat.prompt_templates import ASSISTANT, OPENED, USER
from megatron_r1.data.tokenizer import Tokenizer
from megatron_r1.errors import DataError
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN
from megatron_r1.types import TrainingSample


@dataclass(frozen=True)
class Turn:
    """An assistant's message as it is generated."""

    token_ids: list[int]  #: ends with end of sequence
    closing_ids: list[int]  #: what the template puts after it, on which there is no loss


class ChatTemplate(Protocol):
    """Encodes the messages of a conversation and what the template puts around them."""

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """The prompt: these messages, and what opens the assistant's reply.

        Args:
            messages: of anybody.
            tools: that the assistant may call, a list as JSON text.

        Raises:
            DataError: the template has no place for such messages, or for tools.
        """

    def encode_turn(self, messages: Sequence[Message], tools: str = "") -> tuple[list[int], Turn]:
        """The history before the last message, and that message, which is the assistant's, as a turn.

        What the prompt has opened already (<think>) belongs to the history if the message does not repeat it.
        """


class R1Chat:
    """DeepSeek-R1's chat template: system messages first, no space or newline between markers and text.

    Of past replies only what follows the last </think> is kept. `opened` is the later revision, whose prompt ends in "<think>\\n";
    what the assistant writes is the same.
    """

    def __init__(self, tokenizer: Tokenizer, opened: bool = False):
        self._tokenizer, self._opened = tokenizer, opened

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """See `ChatTemplate`."""
        return self._encode_history(messages, tools) + (self._tokenizer.encode_fixed(OPENED, False) if self._opened else [])

    def encode_turn(self, messages: Sequence[Message], tools: str = "") -> tuple[list[int], Turn]:
        """See `ChatTemplate`."""
        content = messages[-1].content
        _refuse_tools(messages, "")
        if self._opened and goes_on_thinking(content):
            history = self.encode_prompt(messages[:-1], tools)
            return history, Turn([*self._tokenizer.encode_response(content), self._tokenizer.eos_id], [])
        opening = OPENED if self._opened and content.startswith(OPENED) else ""  # apart, as the prompt would have it
        ids = self._tokenizer.encode_response(opening) + self._tokenizer.encode_response(content[len(opening) :])
        return self._encode_history(messages[:-1], tools), Turn([*ids, self._tokenizer.eos_id], [])

    def _encode_history(self, messages: Sequence[Message], tools: str) -> list[int]:
        _refuse_tools(messages, tools)
        tokenizer = self._tokenizer
        system = "\n\n".join(message.content for message in messages if message.role == "system")
        user, assistant = (tokenizer.encode_fixed(marker, not system) for marker in (USER, ASSISTANT))
        ids = tokenizer.start_ids + tokenizer.encode_plain(system)
        for message in messages:
            if message.role == "user":
                ids += user + tokenizer.encode_plain(message.content, False)
            elif message.role == "assistant":
                kept = message.content.split(THINK_CLOSE)[-1]
                ids += [*assistant, *tokenizer.encode_response(kept), tokenizer.eos_id]
        return ids + assistant


class R1Zero:
    """R1-Zero's template, which holds one question."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer

    def encode_prompt(self, messages: Sequence[Message], tools: str = "") -> list[int]:
        """See `ChatTemplate`."""
        _refuse_tools(messages, tools)
        if [message.role for message in messages] != ["user"]:
            raise DataError("data.template=r1_zero holds one question and its response; take r1_chat for conversations")
        return self._tokenizer.encode_prompt("r1_zero", messages[0].content)[1]

    def encode_turn(self, messages: Sequence[Message], tools: str = "") -> tuple[list[int], Turn]:
        """See `ChatTemplate`."""
        _refuse_tools(messages, tools)
        response = [*self._tokenizer.encode_response(messages[-1].content), self._tokenizer.eos_id]
        return self.encode_prompt(messages[:-1]), Turn(response, [])


def goes_on_thinking(content: str) -> bool:
    """Whether a reply begins inside of a reasoning that the prompt has opened."""
    before, closed, _ = content.partition(THINK_CLOSE)
    return bool(closed) and THINK_OPEN not in before


def _refuse_tools(messages: Sequence[Message], tools: str) -> None:
    if tools or any(message.role == "tool" or message.tool_calls for message in messages):
        raise DataError(
            "tools, tool calls and their results have a place only in a tokenizer's own chat template: set data.template=tokenizer"
        )


def encode_chat(tokenizer: Tokenizer, messages: Sequence[Message], response: str) -> list[int]:
    """A conversation in R1's chat template with its last response, end of sequence included, as a reward model reads it."""
    history, turn = R1Chat(tokenizer).encode_turn([*messages, Message("assistant", response)])
    return history + turn.token_ids


def encode_conversation(messages: Sequence[Message], template: ChatTemplate, tools: str = "") -> list[TrainingSample]:
    """Training samples with loss on every message of the assistant once, its end of sequence included, and on nothing else.

    Messages of the assistant that are not trained on are history of those that follow. If none is trained on, there is no sample.

    One sample is enough if the history of each turn is what was trained on before it. If the template changes past turns (R1 cuts
    their reasoning), the turn after a change begins a new sample with the history as the model will see it. So every turn is
    trained whole, in the context in which it is generated.

    Raises:
        DataError: see `ChatTemplate.encode_turn`.
    """
    samples: list[TrainingSample] = []
    ids: list[int] = []
    is_trained: list[int] = []
    for index, message in enumerate(messages):
        if message.role != "assistant" or not message.is_trained:
            continue
        history, turn = template.encode_turn(messages[: index + 1], tools)
        if history[: len(ids)] != ids:
            samples.append(_sample_of(ids, is_trained))
            ids, is_trained = [], []
        is_trained = is_trained + [0] * (len(history) - len(ids)) + [1] * len(turn.token_ids) + [0] * len(turn.closing_ids)
        ids = history + turn.token_ids + turn.closing_ids
    return [*samples, _sample_of(ids, is_trained)] if ids else samples


def _sample_of(ids: list[int], is_trained: list[int]) -> TrainingSample:
    return TrainingSample(np.array(ids, np.int32), np.array(is_trained[1:], np.int8))


def describe_sample(sample: TrainingSample, tokenizer: Tokenizer) -> str:
    """The text of a sample with what is trained on in ⟦ ⟧, control tokens shown."""
    parts: list[str] = []
    is_trained = np.zeros(len(sample.token_ids), np.int8)
    is_trained[1:][sample.trained] = 1
    start = 0
    for end in range(1, len(sample.token_ids) + 1):
        if end == len(sample.token_ids) or is_trained[end] != is_trained[start]:
            text = tokenizer.decode_everything(sample.token_ids[start:end].tolist())
            parts.append(f"⟦{text}⟧" if is_trained[start] else text)
            start = end
    return "".join(parts)
