"""Conversations from the records that people keep them in.

messages     {"messages": [{"role": "user", "content": ...}, ...]}
sharegpt     {"conversations": [{"from": "human", "value": ...}, ...]}
pair         {"prompt": ..., "response": ...}, the names of both fields being settings
alpaca       {"instruction": ..., "input": ..., "output": ...}
preference   the chosen side of {"chosen": ..., "rejected": ...}: a reply to "conversations" or "prompt", a list of messages, or
             a whole dialogue as text ("\\n\\nHuman: ...\\n\\nAssistant: ..."), as Anthropic's hh-rlhf has it
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_r1.data.record_files import take_text
from megatron_r1.errors import DataError

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant"}
_SPEAKER = re.compile(r"\n\n(Human|Assistant):")


@dataclass(frozen=True)
class Message:
    """One turn. Surrounding whitespace is gone when it was read from a record."""

    role: Role
    content: str


def read_conversation(
    record: dict[str, Any], where: str, form: str = "auto", prompt_field: str = "prompt", response_field: str = "response"
) -> list[Message]:
    """The messages of one record; the last is the assistant's.

    Args:
        record: as a file has it.
        where: file and line, for errors.
        form: one of the above, or "auto": found from the fields of the record.

    Raises:
        DataError: one line with `where` for a missing or blank field, an unknown role, or a conversation that ends unanswered.
    """
    form = _tell_form(record, where, prompt_field, response_field) if form == "auto" else form
    if form == "messages":
        messages = _read_messages(_take_field(record, "messages", where), where)
    elif form == "sharegpt":
        messages = _read_messages(_take_field(record, "conversations", where), where)
    elif form == "pair":
        messages = [
            Message("user", take_text(record, prompt_field, where)),
            Message("assistant", take_text(record, response_field, where)),
        ]
    elif form == "alpaca":
        messages = _read_alpaca(record, where)
    else:
        messages = _read_chosen(record, where)
    if not messages or messages[-1].role != "assistant":
        raise DataError(f"{where}: the conversation does not end with the assistant, so nothing answers its last message")
    return messages


def _tell_form(record: dict[str, Any], where: str, prompt_field: str, response_field: str) -> str:
    if "messages" in record:
        return "messages"
    if "chosen" in record:
        return "preference"
    if "conversations" in record:
        return "sharegpt"
    if prompt_field in record or response_field in record:
        return "pair"
    if "instruction" in record:
        return "alpaca"
    raise DataError(
        f"{where}: no conversation in the fields {', '.join(map(repr, record))}; expected messages, conversations, chosen, "
        f"{prompt_field} and {response_field}, or instruction and output"
    )


def _take_field(record: dict[str, Any], field: str, where: str) -> Any:
    if field not in record:
        raise DataError(f"{where}: field {field!r} is missing; the record has {', '.join(map(repr, record)) or 'no fields'}")
    return record[field]


def _read_messages(entries: Any, where: str) -> list[Message]:
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DataError(f"{where}: expected a list of messages, found {type(entries).__name__}")
    return [_read_message(entry, f"{where} message {number}") for number, entry in enumerate(entries, start=1)]


def _read_message(entry: Any, where: str) -> Message:
    """{"role", "content"} or {"from", "value"}."""
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
    role_field, content_field = ("from", "value") if "from" in entry else ("role", "content")
    name = take_text(entry, role_field, where)
    if name not in _ROLES:
        raise DataError(f"{where}: role {name!r} is unknown; choose one of {', '.join(_ROLES)}")
    return Message(_ROLES[name], take_text(entry, content_field, where))


def _read_alpaca(record: dict[str, Any], where: str) -> list[Message]:
    question = take_text(record, "instruction", where)
    if record.get("input"):  # most have none, kept as ""
        question += "\n" + take_text(record, "input", where)
    return [Message("user", question), Message("assistant", take_text(record, "output", where))]


def _read_chosen(record: dict[str, Any], where: str) -> list[Message]:
    chosen = _take_field(record, "chosen", where)
    context = record.get("conversations") or record.get("prompt") or []
    if isinstance(context, str):
        before = [Message("user", take_text(record, "prompt", where))]
    else:
        before = _read_messages(context, where)
    if isinstance(chosen, str):
        if not before:
            return _read_dialogue(chosen, where)
        return [*before, Message("assistant", take_text(record, "chosen", where))]
    messages = _read_messages(chosen if isinstance(chosen, list) else [chosen], f"{where} chosen")
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
