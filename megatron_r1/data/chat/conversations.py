"""Conversations from the records that people keep them in.

messages     {"messages": [{"role": "user", "content": ...}, ...]}
sharegpt     {"conversations": [{"from": "human", "value": ...}, ...]}
pair         {"prompt": ..., "response": ...}, the names of both fields being settings; the prompt may be a list of messages
alpaca       {"instruction": ..., "input": ..., "output": ...}
preference   the chosen side of {"chosen": ..., "rejected": ...}: a reply to "conversations" or "prompt", a list of messages, or
             a whole dialogue as text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), as Anthropic's hh-rlhf has it

Beside these a record may have "system", a text that goes before; "history", the turns before a pair, as LLaMA-Factory has it; the
reasoning of its last reply and the loss on the record, named as in `messages.py`; and "tools", see `messages.read_tools`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from megatron_r1.data.chat.messages import (
    Message,
    is_trained_on,
    join_reasoning,
    read_message,
    read_messages,
    refuse_media,
    take_content,
)
from megatron_r1.data.record_files import is_missing, take_text
from megatron_r1.errors import DataError

_LOSS = ("weight", "train", "training", "trainable", "loss_mask")  # of a record; its "loss" may be a figure
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


def read_conversation(
    record: dict[str, Any], where: str, form: str = "auto", prompt_field: str = "prompt", response_field: str = "response"
) -> list[Message]:
    """The messages of one record; the last is the assistant's.

    Args:
        record: as a file has it.
        where: file and line, for errors.
        form: one of the above, or "auto": found from the fields of the record.

    Raises:
        DataError: one line with `where` for a missing or blank field, an unknown role, a conversation that ends unanswered, or a
            field that is not used but changes the meaning.
    """
    form = _tell_form(record, where, prompt_field, response_field) if form == "auto" else form
    if form == "messages":
        messages = read_messages(_take_field(record, "messages", where), where)
    elif form == "sharegpt":
        messages = read_messages(_take_field(record, "conversations", where), where)
    elif form == "pair":
        asked = read_asked(record, prompt_field, where)
        messages = [*read_history(record, where), *asked, *_read_reply(record, response_field, where)]
    elif form == "alpaca":
        messages = [*read_history(record, where), *_read_alpaca(record, where)]
    else:
        messages = [*read_history(record, where), *_read_chosen(record, where)]
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"{where}: the conversation does not end with the assistant, so nothing answers its last message")
    refuse_media(record, where)
    return _apply_record(record, with_system(record, messages, where), where)


def read_asked(record: dict[str, Any], field: str, where: str) -> list[Message]:
    """What is asked: the text of a field as the user's message, or its list of messages."""
    if isinstance(record.get(field), list):
        return read_messages(record[field], where)
    return [Message("user", take_text(record, field, where))]


def with_system(record: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    """The messages after the record's own "system", if it has one.

    Raises:
        DataError: the messages begin with another one.
    """
    value = record.get("system")
    if is_missing(value) or (isinstance(value, str) and not value.strip()):
        return messages
    system = Message("system", take_content(record, "system", where))
    if messages and messages[0].role == "system":
        if messages[0].content != system.content:
            raise DataError(f"{where}: field 'system' and the first message are different system messages; keep one of them")
        return messages
    return [system, *messages]


def _tell_form(record: dict[str, Any], where: str, prompt_field: str, response_field: str) -> str:
    present = {name for name, value in record.items() if not is_missing(value)} or set(record)
    if "messages" in present:
        return "messages"
    if "chosen" in present:
        return "preference"
    if "conversations" in present:
        return "sharegpt"
    if prompt_field in present or response_field in present:
        return "pair"
    if "instruction" in present:
        return "alpaca"
    raise DataError(
        f"{where}: no conversation in the fields {', '.join(map(repr, record))}; expected messages, conversations, chosen, "
        f"{prompt_field} and {response_field}, or instruction and output"
    )


def _take_field(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise DataError(f"{where}: field {field!r} is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    return record[field]


def _read_reply(record: dict[str, Any], field: str, where: str) -> list[Message]:
    """A response as text, or as a list of messages (TRL's prompt and completion)."""
    value = record.get(field)
    if isinstance(value, list):
        return read_messages(value, f"{where} {field}")
    return [Message("assistant", take_text(record, field, where))]


def _read_alpaca(record: dict[str, Any], where: str) -> list[Message]:
    parts = [
        take_text(record, field, where)
        for field in ("instruction", "input")
        if not is_missing(record.get(field)) and str(record[field]).strip()  # most have no input, kept as ""
    ]
    if not parts:
        take_text(record, "instruction", where)
    return [Message("user", "\n".join(parts)), Message("assistant", take_text(record, "output", where))]


def read_history(record: dict[str, Any], where: str) -> list[Message]:
    """The turns before the last one: [[question, answer], ...], or a list of messages."""
    history = record.get("history")
    if is_missing(history) or history in ("", []):
        return []
    if not isinstance(history, list):
        raise DataError(f"{where}: field 'history' is {type(history).__name__}, not a list of turns")
    if all(isinstance(turn, dict) for turn in history):
        return read_messages(history, f"{where} history")
    messages = []
    for number, turn in enumerate(history, start=1):
        place = f"{where} history {number}"
        if not isinstance(turn, Sequence) or isinstance(turn, str) or len(turn) != 2:
            raise DataError(f"{place}: expected a question and its answer")
        for role, text in zip(("user", "assistant"), turn, strict=True):
            messages.append(read_message({"role": role, "content": text}, place))
    return messages


def _read_chosen(record: dict[str, Any], where: str) -> list[Message]:
    chosen = _take_field(record, "chosen", where)
    context = next((record[name] for name in ("conversations", "prompt") if not is_missing(record.get(name)) and record[name]), [])
    if isinstance(context, str):
        before = [Message("user", take_text(record, "prompt", where))]
    else:
        before = read_messages(context, where)
    if isinstance(chosen, str):
        if not before:
            return _read_dialogue(chosen, where)
        return [*before, Message("assistant", take_text(record, "chosen", where))]
    messages = read_messages(chosen if isinstance(chosen, list) else [chosen], f"{where} chosen")
    # A list may be the reply alone or repeat what it replies to.
    return [*before, *messages] if messages and messages[0].role == "assistant" else messages


def _read_dialogue(text: str, where: str) -> list[Message]:
    before, *parts = _SPEAKER.split(text)
    if before.strip() or not parts:
        raise DataError(f"{where}: field 'chosen' is no dialogue: it does not begin with '\\n\\nHuman:' and there is no 'prompt'")
    return [
        Message("user" if speaker == "Human" else "assistant", take_text({speaker: content}, speaker, f"{where} message {number}"))
        for number, (speaker, content) in enumerate(zip(parts[::2], parts[1::2]), start=1)
    ]


def _apply_record(record: dict[str, Any], messages: list[Message], where: str) -> list[Message]:
    """What the fields of the whole record say of its messages: the reasoning of the last reply, and the loss."""
    for field in ("reasoning_content", "thinking"):
        value = record.get(field)
        if is_missing(value) or (isinstance(value, str) and not value.strip()):
            continue
        if not isinstance(value, str):
            raise DataError(f"{where}: field {field!r} is {value!r}; it may hold the reasoning of the last reply as text")
        last = messages[-1]
        messages = [*messages[:-1], replace(last, content=join_reasoning(value.strip(), last.content, where))]
    masks = record.get("loss_mask")
    if isinstance(masks, list):
        if len(masks) != len(messages):
            raise DataError(f"{where}: loss_mask has {len(masks)} entries for {len(messages)} messages; one for each is read")
        wanted = [
            is_trained_on({"loss_mask": mask}, message.role, f"{where} message {number}")
            for number, (mask, message) in enumerate(zip(masks, messages, strict=True), start=1)
        ]
        messages = [
            replace(message, is_trained=message.is_trained and want) for message, want in zip(messages, wanted, strict=True)
        ]
    said = {name: record[name] for name in _LOSS if name in record and not isinstance(record[name], list)}
    if not is_trained_on(said, "assistant", where):
        messages = [replace(each, is_trained=each.role != "assistant") for each in messages]
    return messages
