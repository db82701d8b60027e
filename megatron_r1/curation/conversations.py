"""Conversations as supervised data holds them: one JSON object a line.

    {"id", "messages": [{"role", "content"}, ...], "domain", "language", "source", ...}

Only `messages` is required. Fields that are not named here are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

from megatron_r1.errors import DataError

ROLES = ("system", "user", "assistant")
DEFAULT_DOMAIN = "general"
_TEXT_FIELDS = ("id", "domain", "language", "source")


@dataclass(frozen=True)
class Conversation:
    """One record. `fields` holds every field of its JSON object but `messages` and those that have a name here."""

    id: str
    messages: tuple[tuple[str, str], ...]  #: (role, content)
    domain: str = DEFAULT_DOMAIN
    language: str = ""  #: "en", "zh", or "" where unknown
    source: str = ""  #: where it comes from
    fields: Mapping[str, Any] | None = None

    @classmethod
    def of_turn(cls, id: str, question: str, content: str, **named: Any) -> Self:
        """One question and its answer; `named` are further fields of the class."""
        return cls(id, (("user", question), ("assistant", content)), **named)

    @property
    def prompt(self) -> str:
        """What the user says, all turns."""
        return "\n\n".join(content for role, content in self.messages if role == "user")

    @property
    def text(self) -> str:
        """What everybody says."""
        return "\n\n".join(content for _, content in self.messages)

    @property
    def turns(self) -> list[tuple[str, str]]:
        """(what the user says, what the assistant answers), in order."""
        turns, asked = [], ""
        for role, content in self.messages:
            if role == "user":
                asked = content
            elif role == "assistant":
                turns.append((asked, content))
        return turns

    def field(self, name: str) -> Any:
        """A field that has no name here, or None."""
        return (self.fields or {}).get(name)

    def renamed(self, id: str) -> Self:
        """The same under another id."""
        return replace(self, id=id)

    def to_json(self) -> dict[str, Any]:
        """As one object of a file."""
        messages = [{"role": role, "content": content} for role, content in self.messages]
        named = {"domain": self.domain, "language": self.language, "source": self.source}
        return {"id": self.id, "messages": messages, **named, **(self.fields or {})}


def read_conversations(path: Path) -> Iterator[tuple[str, Conversation]]:
    """The conversations of a .jsonl file, each with "file:line", one line at a time: the file need not fit into memory.

    A record without an id is named after the file and its line, one without a source after the file.

    Raises:
        DataError: file and line of what is missing or malformed; a file without a record.
    """
    for line in read_lines(path):
        yield line.where, parse_conversation(line.raw, line.where, path.stem)


class Line(NamedTuple):
    """A line of a file."""

    where: str  #: "file:line"
    offset: int  #: bytes before it
    raw: bytes


def read_lines(path: Path) -> Iterator[Line]:
    """The lines that are not blank.

    Raises:
        DataError: another suffix than .jsonl, a file that cannot be read, or one without a line.
    """
    if path.suffix != ".jsonl":
        raise DataError(f"{path}: expected a .jsonl file, one object a line")
    offset = 0
    found = False
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if raw.strip():
                    found = True
                    yield Line(f"{path}:{number}", offset, raw)
                offset += len(raw)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if not found:
        raise DataError(f"{path}: the file is empty")


def parse_conversation(raw: bytes, where: str, source: str) -> Conversation:
    """One line.

    Args:
        source: of a record that names none; with the line's number it is also the id of a record that has none.

    Raises:
        DataError: see `read_conversations`.
    """
    record = parse_object(raw, where)
    messages = record.pop("messages", None)
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{where}: field 'messages' is missing or no list of messages")
    taken = tuple(_take_message(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1))
    if "user" not in [role for role, _ in taken] or taken[-1][0] != "assistant":
        raise DataError(f"{where}: a conversation has a user's message and ends with the assistant's")
    named = {name: _take_field(record.pop(name, None), name, where) for name in _TEXT_FIELDS}
    return Conversation(
        named["id"] or f"{source}-{where.rpartition(':')[2]}",
        taken,
        named["domain"] or DEFAULT_DOMAIN,
        named["language"],
        named["source"] or source,
        record,
    )


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object of one line.

    Raises:
        DataError: bad JSON, not UTF-8, or something that is no object.
    """
    try:
        record = json.loads(raw.decode("utf-8-sig"))  # a byte order mark may begin the first line
    except (ValueError, RecursionError) as error:  # ValueError: also what is not UTF-8
        raise DataError(f"{where}: bad JSON ({str(error).splitlines()[0]})") from None
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {type(record).__name__}")
    return record


def to_lines(conversations: Sequence[Conversation]) -> str:
    """As JSON lines."""
    return "".join(json.dumps(conversation.to_json(), ensure_ascii=False) + "\n" for conversation in conversations)


def is_text(value: Any) -> bool:
    """Whether a value is text that can be written as UTF-8: half a surrogate pair cannot."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _take_message(message: Any, where: str) -> tuple[str, str]:
    if not isinstance(message, dict) or "role" not in message or "content" not in message:
        raise DataError(f"{where} is no object with 'role' and 'content'")
    if message["role"] not in ROLES:
        raise DataError(f"{where} has the unknown role {message['role']!r:.40}; choose one of {', '.join(ROLES)}")
    if not is_text(message["content"]) or not message["content"].strip():
        raise DataError(f"{where} has a content that is blank or not text")
    return message["role"], message["content"]


def _take_field(value: Any, name: str, where: str) -> str:
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not is_text(value):
        raise DataError(f"{where}: field {name!r} is not text")
    return value
