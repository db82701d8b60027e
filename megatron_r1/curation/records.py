"""Conversations as curation reads and writes them: one JSON object a line.

    {"id", "messages": [{"role", "content"}, ...], "domain", "language", "source", ...}

Only the conversation is required, in any form that `data.conversations` reads. Other fields are kept as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from megatron_r1.data.chat.conversations import read_conversation
from megatron_r1.data.chat.messages import Message
from megatron_r1.data.record_files import RawLine, parse_object, stream_lines, take_text
from megatron_r1.errors import DataError

DEFAULT_DOMAIN = "general"
_NAMED = ("id", "domain", "language", "source")
#: fields that the messages hold once they are read
_FORMS = (
    "messages", "conversations", "instruction", "input", "output", "chosen", "rejected", "prompt", "response", "system", "history",
    "reasoning_content", "thinking", "weight", "train", "training", "trainable", "loss_mask",
)  # fmt: skip


@dataclass(frozen=True)
class Conversation:
    """One record."""

    id: str
    messages: tuple[Message, ...]
    domain: str = DEFAULT_DOMAIN
    language: str = ""  #: "en", "zh", or "" if unknown
    source: str = ""  #: the file or data set that it comes from
    fields: Mapping[str, Any] = field(default_factory=dict)  #: those of its JSON object that have no name here

    @classmethod
    def of_turn(cls, id: str, question: str, content: str, **named: Any) -> Self:
        """One question and its answer; `named` are further fields of the class."""
        return cls(id, (Message("user", question), Message("assistant", content)), **named)

    @property
    def prompt(self) -> str:
        """What the user says, all turns."""
        return "\n\n".join(message.content for message in self.messages if message.role == "user")

    @property
    def text(self) -> str:
        """What everybody says."""
        return "\n\n".join(message.content for message in self.messages)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(what the user says, what the assistant answers), in order."""
        turns, asked = [], ""
        for message in self.messages:
            if message.role == "user":
                asked = message.content
            elif message.role == "assistant":
                turns.append((asked, message.content))
        return turns

    def renamed(self, id: str) -> Self:
        """The same under another id."""
        return replace(self, id=id)

    def answered(self, content: str) -> Self:
        """The same with another last answer."""
        return replace(self, messages=(*self.messages[:-1], Message("assistant", content)))

    def with_fields(self, **fields: Any) -> Self:
        """The same with further fields, or others in place of those it has."""
        return replace(self, fields={**self.fields, **fields})

    def to_json(self) -> dict[str, Any]:
        """As one object of a file."""
        messages = [message.to_json() for message in self.messages]
        named = {"domain": self.domain, "language": self.language, "source": self.source}
        return {"id": self.id, "messages": messages, **named, **self.fields}


def read_file(path: Path) -> Iterator[Conversation]:
    """The conversations of a .jsonl file, one line at a time: the file need not fit into memory.

    Raises:
        DataError: what `stream_lines` and `parse_line` raise, and an id that comes twice.
    """
    seen: dict[str, str] = {}
    for line in stream_lines(path):
        conversation = parse_line(line, path.stem)
        check_id(conversation.id, line.where, seen)
        yield conversation


def check_id(id: str, where: str, seen: dict[str, str]) -> None:
    """Note the place of an id.

    Raises:
        DataError: it stands somewhere else already.
    """
    if id in seen:
        raise DataError(f"{where}: the id {id!r} stands already at {seen[id]}; every record needs its own")
    seen[id] = where


def parse_line(line: RawLine, source: str) -> Conversation:
    """One line.

    Args:
        source: for a record that names none; with the number of the line it is also the id of a record without one.

    Raises:
        DataError: file and line of what is missing or malformed.
    """
    record = parse_object(line.raw, line.where)
    messages = tuple(read_conversation(record, line.where))
    if not any(message.role == "user" for message in messages):
        raise DataError(f"{line.where}: the user says nothing in this conversation")
    named = {name: take_text(record, name, line.where) if record.get(name) not in (None, "") else "" for name in _NAMED}
    return Conversation(
        named["id"] or f"{source}-{line.where.rpartition(':')[2]}",
        messages,
        named["domain"] or DEFAULT_DOMAIN,
        named["language"],
        named["source"] or source,
        {name: value for name, value in record.items() if name not in (*_NAMED, *_FORMS)},
    )
