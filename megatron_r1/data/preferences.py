"""What reward models learn from: pairs of responses of which one was preferred, and responses labelled safe or unsafe.

A record of pairs has one of these shapes; a message is {"role": ..., "content": ...} or {"from": ..., "value": ...}:

    {"prompt": text or messages, "chosen": text or messages, "rejected": ...}
    {"conversations": messages, "chosen": message, "rejected": message}
    {"chosen": dialogue, "rejected": dialogue}     messages, or one text "\\n\\nHuman: ...\\n\\nAssistant: ..." (Anthropic's HH)

A labelled record is {"prompt": text or messages, "response": text, "safe": true or false}.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_r1.data.chat.conversations import read_history, with_system
from megatron_r1.data.chat.messages import Message, Role, read_message, read_tools, refuse_media
from megatron_r1.data.record_files import is_missing, read_records, take_text
from megatron_r1.data.split import is_heldout
from megatron_r1.errors import DataError

_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "human": "user", "Human": "user", "assistant": "assistant", "gpt": "assistant",
    "Assistant": "assistant",
}  # fmt: skip
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Dialogue:
    """A response and what it answers."""

    messages: tuple[Message, ...]  #: ends with the user's turn; not empty
    response: str  #: may be empty: published pairs have such


@dataclass(frozen=True)
class LabelledDialogues:
    """One example with its preference or label."""

    where: str  #: file and line
    dialogues: tuple[Dialogue, ...]  #: (chosen, rejected), or the labelled one
    safe: bool = True  #: the label of a labelled one


def read_pairs(path: Path) -> list[LabelledDialogues]:
    """Preference pairs of a file or of all files of a folder; see `record_files`.

    Raises:
        DataError: file and line of what is missing, malformed or of no known shape.
    """
    return [LabelledDialogues(where, _take_pair(record, where)) for where, record in read_records(path, split=None)]


def read_labelled(path: Path) -> list[LabelledDialogues]:
    """Responses labelled safe or unsafe, from the same kinds of files.

    Raises:
        DataError: file and line of what is missing or malformed.
    """
    examples = []
    for where, record in read_records(path, split=None):
        safe = record.get("safe")
        if not isinstance(safe, bool):
            raise DataError(f"{where}: field 'safe' is {'missing' if safe is None else repr(safe)}, it must be true or false")
        prompt = _take_context(record, _take_prompt(record, "prompt", where), where)
        dialogue = Dialogue(prompt, take_text(record, "response", where))
        examples.append(LabelledDialogues(where, (dialogue,), safe))
    return examples


READERS: dict[str, Callable[[Path], list[LabelledDialogues]]] = {"helpful": read_pairs, "safety": read_labelled}


def split_heldout(examples: list[LabelledDialogues], fraction: float) -> tuple[list[LabelledDialogues], list[LabelledDialogues]]:
    """(training, held-out) parts by a hash of what the person says first, so that no conversation is in both."""
    parts: tuple[list[LabelledDialogues], list[LabelledDialogues]] = ([], [])
    for example in examples:
        messages = example.dialogues[0].messages
        opening = next((message for message in messages if message.role == "user"), messages[0])
        parts[is_heldout(opening.content, fraction)].append(example)
    return parts


def _take_pair(record: dict[str, Any], where: str) -> tuple[Dialogue, Dialogue]:
    field = next((name for name in ("prompt", "conversations") if not is_missing(record.get(name))), None)
    prompt = () if field is None else _take_prompt(record, field, where)
    prompt = _take_context(record, prompt, where)
    chosen, rejected = (_take_dialogue(record, side, prompt, where) for side in ("chosen", "rejected"))
    return chosen, rejected


def _take_context(record: dict[str, Any], prompt: tuple[Message, ...], where: str) -> tuple[Message, ...]:
    """The prompt after what the record says of it elsewhere: system message and history."""
    refuse_media(record, where)
    if read_tools(record, where):
        raise DataError(f"{where}: the record has tools, for which a reward model's conversations have no place")
    context = with_system(record, [*read_history(record, where), *prompt], where)
    if len(context) > len(prompt) and not prompt:
        raise DataError(f"{where}: fields 'system' and 'history' go with a 'prompt', which is missing")
    return tuple(context)


def _take_prompt(record: dict[str, Any], field: str, where: str) -> tuple[Message, ...]:
    if isinstance(record.get(field), list):
        messages = _take_messages(record[field], field, where)
    else:
        messages = (Message("user", take_text(record, field, where)),)
    if messages[-1].role == "assistant":
        raise DataError(f"{where}: field {field!r} ends with a turn of the assistant, it must end with what is to be answered")
    return messages


def _take_dialogue(record: dict[str, Any], side: str, prompt: tuple[Message, ...], where: str) -> Dialogue:
    """One side of a pair: a response to `prompt`, or a whole dialogue, which begins with `prompt` if there is one."""
    value = record.get(side)
    if isinstance(value, dict):
        value = [value]
    if isinstance(value, list):
        turns = _take_messages(value, side, where)
    elif prompt:
        turns = (Message("assistant", take_text(record, side, where)),)
    else:
        turns = _split_turns(take_text(record, side, where), side, where)
    if turns[-1].role != "assistant":
        raise DataError(f"{where}: field {side!r} does not end with a turn of the assistant")
    before = turns[:-1] or prompt
    if not before or (prompt and before != prompt):
        raise DataError(f"{where}: field {side!r} {'answers another prompt' if before else 'has no prompt before the response'}")
    return Dialogue(before, turns[-1].content)


def _take_messages(entries: list[Any], field: str, where: str) -> tuple[Message, ...]:
    messages = []
    for entry in entries:
        is_message = isinstance(entry, dict)
        role = (entry.get("role") or entry.get("from")) if is_message else None
        content = entry.get("content", entry.get("value")) if is_message else None
        if role not in _ROLES or not isinstance(content, (str, list)):
            raise DataError(f"{where}: field {field!r} has a turn that is no message of system, user or assistant with a text")
        message = read_message(entry, f"{where} {field}", may_be_blank=True)
        if message.tool_calls:
            raise DataError(f"{where}: field {field!r} has tool calls, for which a reward model's conversations have no place")
        messages.append(message)
    if not messages:
        raise DataError(f"{where}: field {field!r} has no turns")
    return tuple(messages)


def _split_turns(text: str, side: str, where: str) -> tuple[Message, ...]:
    lead, *parts = _TURN.split(text)
    if lead.strip() or not parts:
        raise DataError(
            f"{where}: field {side!r} does not begin with 'Human:', and there is no field 'prompt' or 'conversations' beside it"
        )
    return tuple(Message(_ROLES[role], content.strip()) for role, content in zip(parts[0::2], parts[1::2], strict=True))
