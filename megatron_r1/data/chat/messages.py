"""One message of a conversation, from the fields that people keep it in. A field that changes what it means is used or refused.

    role, from                              a speaker of OpenAI's, ShareGPT's or Open Assistant's names
    content, value                          text, or parts of type text
    reasoning_content, thinking, reasoning  go before the content as <think> reasoning </think>
    tool_calls, function_call               what the assistant asks of tools
    name, tool_call_id                      of a tool's message
    weight, train, trainable, loss_mask ... 0 or 1: whether the assistant's message is trained on

null and NaN are missing values everywhere: tables fill the fields that a message does not have with them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from megatron_r1.data.record_files import is_missing, take_text
from megatron_r1.errors import DataError
from megatron_r1.tags import THINK_CLOSE, THINK_OPEN

Role = Literal["system", "user", "assistant", "tool"]
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant", "human": "user", "gpt": "assistant", "tool": "tool",
    "developer": "system", "prompter": "user", "chatgpt": "assistant", "bing": "assistant", "bard": "assistant",
    "model": "assistant", "bot": "assistant", "chatbot": "assistant", "observation": "tool", "function": "tool",
    "function_call": "assistant",
}  # fmt: skip
REASONING = ("reasoning_content", "thinking", "reasoning")
LOSS = ("weight", "train", "training", "trainable", "loss_mask", "loss")
_LOSS_OF_PARTS = ("train_detail", "training_detail")  # axolotl's
MEDIA = ("images", "image", "image_url", "videos", "video", "audios", "audio", "input_audio")
_TEXT_PARTS = (None, "text", "input_text", "output_text")


@dataclass(frozen=True)
class Message:
    """One turn. Surrounding whitespace is gone when it was read from a record."""

    role: Role
    content: str  #: of the assistant: its reasoning included
    is_trained: bool = True  #: whether there is loss on it, if it is the assistant's
    tool_calls: str = ""  #: of the assistant, a list as JSON text
    name: str = ""  #: of a tool's message: the tool
    tool_call_id: str = ""  #: of a tool's message: the call that it answers

    def to_json(self) -> dict[str, Any]:
        """As an object of a list of messages, from which `read_message` makes the same."""
        more = {"name": self.name, "tool_call_id": self.tool_call_id}
        entry: dict[str, Any] = {"role": self.role, "content": self.content, **{key: value for key, value in more.items() if value}}
        if self.tool_calls:  # arguments as text, as OpenAI has them: null inside of a text is a value
            entry["tool_calls"] = [with_text_arguments(call) for call in json.loads(self.tool_calls)]
        return entry if self.is_trained else {**entry, "weight": 0}


def read_messages(entries: Any, where: str) -> list[Message]:
    """The messages of a list.

    Raises:
        DataError: no list, or what `read_message` raises.
    """
    if isinstance(entries, dict) and entries and all(isinstance(column, list) for column in entries.values()):
        if len(set(map(len, entries.values()))) > 1:
            raise DataError(f"{where}: the columns {', '.join(entries)} have different lengths")
        entries = [dict(zip(entries, row, strict=True)) for row in zip(*entries.values(), strict=True)]  # older tables of datasets
    if not isinstance(entries, Sequence) or isinstance(entries, str):
        raise DataError(f"{where}: expected a list of messages, found {type(entries).__name__}")
    return [read_message(entry, f"{where} message {number}") for number, entry in enumerate(entries, start=1)]


def read_message(entry: Any, where: str, may_be_blank: bool = False) -> Message:
    """{"role", "content"} or {"from", "value"}, and the further fields above.

    Raises:
        DataError: after `where`, a missing or blank field, an unknown role, or something that is not used here.
    """
    if not isinstance(entry, dict):
        raise DataError(f"{where}: expected an object, found {type(entry).__name__}")
    by_value = not is_missing(entry.get("from"))
    role_field, content_field = ("from", "value") if by_value else ("role", "content")
    name = take_text(entry, role_field, where)
    if name.casefold() not in _ROLES:
        raise DataError(f"{where}: role {name!r} is unknown; choose one of {', '.join(_ROLES)}")
    role = _ROLES[name.casefold()]
    refuse_media(entry, where)
    if name.casefold() == "function_call":
        calls = read_tool_calls(entry[content_field], where) if content_field in entry else ""
        content = ""
    else:
        calls = _calls_of(entry, where)
        blank = may_be_blank or role == "tool" or bool(calls)
        content = take_content(entry, content_field, where, blank)
    reasoning = _reasoning_of(entry, where)
    if role != "assistant" and (calls or reasoning):
        raise DataError(f"{where}: {'tool calls' if calls else 'reasoning'} in a message of {name!r}: only the assistant has them")
    message = Message(role, join_reasoning(reasoning, content, where), is_trained_on(entry, role, where), calls)
    if role != "tool":
        return message
    return replace(message, **{key: _optional_text(entry, key, where) for key in ("name", "tool_call_id")})


def take_content(entry: dict[str, Any], field: str, where: str, may_be_blank: bool = False) -> str:
    """The text of a field that holds text or a list of parts.

    Raises:
        DataError: a part that is no text, or a blank text.
    """
    value = entry.get(field)
    if may_be_blank and (is_missing(value) or value in ("", [])):
        return ""
    if not isinstance(value, list):
        return "" if may_be_blank and isinstance(value, str) and not value.strip() else take_text(entry, field, where)
    texts = []
    for number, part in enumerate(value, start=1):
        place = f"{where} part {number}"
        if isinstance(part, str):
            part = {"text": part}
        if not isinstance(part, dict):
            raise DataError(f"{place}: expected an object, found {type(part).__name__}")
        refuse_media(part, place)
        kind = None if is_missing(part.get("type")) else part["type"]
        if kind not in _TEXT_PARTS:
            raise DataError(f"{place} is of type {kind!r}: this project trains on text, only parts of type text are read")
        if not isinstance(part.get("text"), str):
            raise DataError(f"{place}: field 'text' is {type(part.get('text')).__name__}, not text")
        texts.append(part["text"])
    return take_content({field: "\n".join(texts)}, field, where, may_be_blank)  # joined as vLLM joins them


def join_reasoning(reasoning: str, content: str, where: str) -> str:
    """The content of an assistant's message with the reasoning that stood apart from it.

    Raises:
        DataError: the content has another reasoning of its own.
    """
    if not reasoning:
        return content
    inside, closed, _ = content.partition(THINK_CLOSE)
    if not closed:
        return f"{THINK_OPEN}\n{reasoning}\n{THINK_CLOSE}\n\n{content}".rstrip()
    if inside.strip().removeprefix(THINK_OPEN).strip() != reasoning:
        raise DataError(f"{where}: the reasoning stands both in the content and beside it, and the two differ")
    return content


def read_tool_calls(value: Any, where: str) -> str:
    """Tool calls as JSON text: a call or a list of them, each as an object or as JSON text. Arguments become objects.

    Raises:
        DataError: something else.
    """
    calls = _parse_json_text(value, "tool_calls", where)
    calls = calls if isinstance(calls, list) else [calls]
    made = []
    for call in calls:
        function = call.get("function") if isinstance(call, dict) and not is_missing(call.get("function")) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"].strip():
            raise DataError(f"{where}: a tool call is no object with the name of a function")
        arguments = function.get("arguments", function.get("parameters"))
        if isinstance(arguments, str):
            arguments = _parsed_or_text(arguments)  # null inside of such a text was meant
        else:
            arguments = without_missing(arguments)
        more = {"id": call["id"]} if isinstance(call.get("id"), str) and call["id"] else {}
        made.append(
            {
                "type": "function",
                **more,
                "function": {"name": function["name"], "arguments": {} if arguments is None else arguments},
            }
        )
    return json.dumps(made, ensure_ascii=False) if made else ""


def read_tools(record: dict[str, Any], where: str) -> str:
    """The tools of a record, a list as JSON text; "" if it has none.

    Raises:
        DataError: no list of objects.
    """
    for field in ("tools", "functions"):
        value = record.get(field)
        if is_missing(value) or value in ("", []) or (isinstance(value, str) and not value.strip()):
            continue
        tools = without_missing(_parse_json_text(value, field, where))
        if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
            raise DataError(f"{where}: field {field!r} is no list of tools, nor JSON text of one")
        if field == "functions":  # the older form
            tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
        return json.dumps(tools, ensure_ascii=False) if tools else ""
    return ""


def is_trained_on(entry: dict[str, Any], role: Role, where: str) -> bool:
    """Whether a message of the assistant is trained on, as its fields say; true if they say nothing, and for all others.

    Raises:
        DataError: fields that differ, a share of a loss, or loss on what somebody else says.
    """
    for field in _LOSS_OF_PARTS:
        if not is_missing(entry.get(field)) and entry[field] not in ("", [], {}):
            raise DataError(f"{where}: {field} asks for loss on parts of a message; messages are trained on as a whole, or not")
    said = {}
    for field in LOSS:
        value = entry.get(field)
        if is_missing(value):
            continue
        if isinstance(value, str) or not isinstance(value, (bool, int, float)) or value not in (0, 1):
            raise DataError(f"{where}: {field} is {value!r}; only 1 or true (trained on) and 0 or false (not) are known")
        said[field] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"{where}: {' and '.join(said)} contradict each other")
    if role == "assistant":
        return next(iter(said.values()), True)
    if any(said.values()):
        raise DataError(f"{where}: {next(iter(said))} asks to train on a message of {role}; only the assistant's are trained on")
    return True


def refuse_media(entry: dict[str, Any], where: str) -> None:
    """Raises DataError for pictures, sounds and films, which no model here takes."""
    for field in MEDIA:
        value = entry.get(field)
        if not is_missing(value) and value not in ("", [], {}):
            raise DataError(f"{where}: field {field!r} holds what is no text: this project trains on text, leave the example out")


def without_missing(value: Any) -> Any:
    """A value without the keys that a table filled with null. A default that is null was meant."""
    if isinstance(value, dict):
        return {key: without_missing(inner) for key, inner in value.items() if key == "default" or not is_missing(inner)}
    return [without_missing(inner) for inner in value] if isinstance(value, list) else value


def _calls_of(entry: dict[str, Any], where: str) -> str:
    for field in ("tool_calls", "function_call"):
        value = entry.get(field)
        if not is_missing(value) and value not in ("", [], {}):
            value = without_missing(value) if isinstance(value, dict) else value
            return read_tool_calls(value, where) if value else ""
    return ""


def _reasoning_of(entry: dict[str, Any], where: str) -> str:
    found = {_optional_text(entry, field, where) for field in REASONING} - {""}
    if len(found) > 1:
        raise DataError(f"{where}: the fields {', '.join(REASONING)} hold different reasonings")
    return found.pop() if found else ""


def _optional_text(entry: dict[str, Any], field: str, where: str) -> str:
    value = entry.get(field)
    return "" if is_missing(value) or (isinstance(value, str) and not value.strip()) else take_text(entry, field, where)


def with_text_arguments(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments are JSON text, not an object."""
    function = call["function"]
    text = function["arguments"]
    text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return {**call, "function": {**function, "arguments": text}}


def _parse_json_text(value: Any, field: str, where: str) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {field} is a text that is no JSON ({str(error).splitlines()[0]})") from error


def _parsed_or_text(text: str) -> Any:
    try:
        return json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError):
        return text  # what a model wrote, which may be no JSON
