"""Conversations from every form of record, and what is said of broken ones."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_r1.data.chat.conversations import read_conversation
from megatron_r1.data.chat.messages import Message, read_tools
from megatron_r1.data.record_files import read_records
from megatron_r1.errors import DataError
from tests.public_data import public_file

HELLO = [Message("user", "Hello?"), Message("assistant", "Hi!")]
CHAT = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": " Hi!\n"}]
KIND = Message("system", "Be kind.")
AB = [Message("user", "A?"), Message("assistant", "B.")]
SHAREGPT = [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi!"}]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, [KIND, *HELLO]),
        ({"conversations": SHAREGPT}, HELLO),
        ({"prompt": "Hello?", "response": "Hi!"}, HELLO),
        ({"instruction": "Hello?", "input": "", "output": "Hi!"}, HELLO),
        ({"instruction": "Say it", "input": "twice", "output": "Hi!"}, [Message("user", "Say it\ntwice"), HELLO[1]]),
        ({"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "No."}}, HELLO),
        ({"prompt": "Hello?", "chosen": "Hi!", "rejected": "No."}, HELLO),
        ({"prompt": "Hello?", "chosen": CHAT, "rejected": CHAT}, HELLO),
        ({"prompt": CHAT[:1], "chosen": CHAT[1:], "rejected": CHAT[1:]}, HELLO),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: Hi!\n\nHuman: x\ny\n\nAssistant: z", "rejected": ""},
         [*HELLO, Message("user", "x\ny"), Message("assistant", "z")]),
    ],
)  # fmt: skip
def test_each_form_is_told_by_its_fields(record, expected):
    assert read_conversation(record, "x:1") == expected


def test_fields_of_pairs_and_the_form_can_be_named():
    record = {"question": "Hello?", "answer": "Hi!", "messages": []}
    assert read_conversation(record, "x:1", "pair", "question", "answer") == HELLO


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"messages": [{"role": "narrator", "content": "x"}]}, "x:1 message 1: role 'narrator' is unknown; choose one of system"),
        ({"conversations": [*SHAREGPT, {"from": "function_call", "value": "x"}]}, "message 3: tool_calls is a text that is no"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " \n"}]}, "x:1 message 2: field 'content' is blank"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "message 2: field 'content' is NoneType, not text"),
        ({"messages": [CHAT[0], {"role": "assistant"}]}, "message 2: field 'content' is missing"),
        ({"messages": ["Hello?"]}, "message 1: expected an object, found str"),
        ({"messages": "Hello?"}, "expected a list of messages, found str"),
        ({"messages": CHAT[:1]}, "the conversation does not end with the assistant"),
        ({"messages": []}, "the conversation does not end with the assistant"),
        ({"prompt": "Hello?"}, "field 'response' is missing"),
        ({"instruction": "Hello?", "output": ""}, "field 'output' is blank"),
        ({"chosen": "\n\nHuman: Hello?\n\nAssistant: "}, "x:1 message 2: field 'Assistant' is blank"),
        ({"chosen": "Hi!"}, "field 'chosen' is no dialogue"),
        ({"text": "Hi!"}, "no conversation in the fields 'text'; expected messages"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_is_told_on_one_line(record, says):
    with pytest.raises(DataError) as caught:
        read_conversation(record, "x:1")
    assert says in str(caught.value) and str(caught.value).startswith("x:1") and "\n" not in str(caught.value)


ASK = CHAT[0]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALLS = json.dumps([CALL])


def called(arguments: dict, **more: str) -> str:
    return json.dumps([{"type": "function", **more, "function": {"name": "add", "arguments": arguments}}])


def reply(**fields) -> list[Message]:
    """Of a conversation whose last message has these fields."""
    return read_conversation({"messages": [ASK, {"role": "assistant", "content": "Hi!", **fields}]}, "x:1")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"system": "Be kind.", "messages": CHAT}, [KIND, *HELLO]),
        ({"system": "Be kind.", "conversations": SHAREGPT}, [KIND, *HELLO]),
        ({"system": "Be kind.", "messages": [{"role": "system", "content": "Be kind."}, *CHAT]}, [KIND, *HELLO]),
        ({"system": "Be kind.", "instruction": "Hello?", "output": "Hi!"}, [KIND, *HELLO]),
        ({"system": "Be kind.", "prompt": "Hello?", "chosen": "Hi!"}, [KIND, *HELLO]),
        ({"system": " ", "history": [], "instruction": "Hello?", "output": "Hi!"}, HELLO),
        ({"system": None, "history": None, "input": None, "instruction": "Hello?", "output": "Hi!"}, HELLO),
        ({"system": float("nan"), "history": float("nan"), "input": float("nan"), "instruction": "Hello?", "output": "Hi!"}, HELLO),
        ({"instruction": "", "input": "Hello?", "output": "Hi!"}, HELLO),
        ({"history": [["A?", "B."], ["C?", "D."]], "instruction": "Hello?", "output": "Hi!"},
         [*AB, Message("user", "C?"), Message("assistant", "D."), *HELLO]),
        ({"history": [("A?", "B.")], "prompt": "Hello?", "response": "Hi!"}, [*AB, *HELLO]),
        ({"history": CHAT, "prompt": "Hello?", "response": "Hi!"}, [*HELLO, *HELLO]),
        ({"system": "S", "history": [["A?", "B."]], "prompt": "Hello?", "response": "Hi!"},
         [Message("system", "S"), *AB, *HELLO]),
        ({"prompt": CHAT[:1], "response": "Hi!"}, HELLO),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, HELLO),
        ({"messages": None, "conversations": SHAREGPT, "instruction": None}, HELLO),
        ({"conversations": [{"from": "Human", "value": "Hello?"}, {"from": "chatgpt", "value": "Hi!"}]}, HELLO),
        ({"conversations": [{"from": "prompter", "value": "Hello?"}, {"from": "bard", "value": "Hi!"}]}, HELLO),
        ({"messages": [{"role": "developer", "content": "Be kind."}, *CHAT]}, [KIND, *HELLO]),
        ({"messages": [{"from": None, "value": None, **ASK}, CHAT[1]]}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?"}]}, CHAT[1]]}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello?", "image_url": None}]}, CHAT[1]]}, HELLO),
        ({"messages": [{"role": "user", "content": [{"type": None, "text": "A"}, "B"]}, CHAT[1]]},
         [Message("user", "A\nB"), HELLO[1]]),
        ({"messages": CHAT, "images": [], "videos": None, "audio": ""}, HELLO),
        ({"instruction": "Hello?", "output": "Hi!", "thinking": "Well."},
         [HELLO[0], Message("assistant", "<think>\nWell.\n</think>\n\nHi!")]),
        ({"messages": CHAT, "weight": 1.0, "train": True, "loss": 2.5, "reasoning": "off"}, HELLO),
        ({"messages": CHAT, "loss_mask": [0, 1]}, HELLO),
        ({"messages": CHAT, "loss_mask": [0, 0]}, [HELLO[0], replace(HELLO[1], is_trained=False)]),
        ({"messages": CHAT, "weight": 0}, [HELLO[0], replace(HELLO[1], is_trained=False)]),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'},
                            {"from": "observation", "value": "2"}, SHAREGPT[1]]},
         [HELLO[0], Message("assistant", "", tool_calls=CALLS), Message("tool", "2"), HELLO[1]]),
        ({"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                       {"role": "tool", "content": "", "name": "add", "tool_call_id": "1"}, CHAT[1]]},
         [HELLO[0], Message("assistant", "", tool_calls=CALLS), Message("tool", "", name="add", tool_call_id="1"), HELLO[1]]),
    ],
)  # fmt: skip
def test_fields_beside_the_messages_are_used(record, expected):
    assert read_conversation(record, "x:1", response_field="completion" if "completion" in record else "response") == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"reasoning_content": " Well.\n"}, Message("assistant", "<think>\nWell.\n</think>\n\nHi!")),
        ({"thinking": "Well.", "reasoning_content": None}, Message("assistant", "<think>\nWell.\n</think>\n\nHi!")),
        ({"reasoning": "Well.", "thinking": "Well."}, Message("assistant", "<think>\nWell.\n</think>\n\nHi!")),
        ({"reasoning_content": ""}, HELLO[1]),
        ({"thinking": float("nan")}, HELLO[1]),
        ({"reasoning_content": "Well.", "content": "<think>Well.</think>Hi!"}, Message("assistant", "<think>Well.</think>Hi!")),
        ({"reasoning_content": "Well.", "content": "Well.</think>Hi!"}, Message("assistant", "Well.</think>Hi!")),
        ({"weight": 0}, replace(HELLO[1], is_trained=False)),
        ({"weight": 1, "train": None, "train_detail": []}, HELLO[1]),
        ({"train": False}, replace(HELLO[1], is_trained=False)),
        ({"trainable": 0.0}, replace(HELLO[1], is_trained=False)),
        ({"loss_mask": 0, "loss": False}, replace(HELLO[1], is_trained=False)),
        ({"loss_mask": float("nan")}, HELLO[1]),
        ({"tool_calls": None}, HELLO[1]),
        ({"tool_calls": [], "function_call": {"name": None, "arguments": None}}, HELLO[1]),
        ({"tool_calls": [{"id": "7", "type": None, "function": {"name": "add", "arguments": '{"a": null}'}}], "content": None},
         Message("assistant", "", tool_calls=called({"a": None}, id="7"))),
        ({"tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "city": None, "of": {"b": None}}}}]},
         Message("assistant", "Hi!", tool_calls=called({"a": 1, "of": {}}))),
        ({"function_call": {"name": "add", "arguments": '{"a": 1}'}, "content": ""}, Message("assistant", "", tool_calls=CALLS)),
        ({"tool_calls": json.dumps([CALL]), "content": ""}, Message("assistant", "", tool_calls=CALLS)),
        ({"tool_calls": [{"name": "add", "arguments": "no JSON"}]},
         Message("assistant", "Hi!", tool_calls='[{"type": "function", "function": {"name": "add", "arguments": "no JSON"}}]')),
    ],
)  # fmt: skip
def test_fields_of_a_message_are_used(fields, expected):
    assert reply(**fields) == [HELLO[0], expected]
    assert read_conversation({"messages": [message.to_json() for message in reply(**fields)]}, "x:1") == [HELLO[0], expected]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"system": "A", "messages": [{"role": "system", "content": "B"}, *CHAT]}, "different system messages"),
        ({"system": {"a": 1}, "messages": CHAT}, "field 'system' is dict, not text"),
        ({"history": "A? B.", "instruction": "Hello?", "output": "Hi!"}, "field 'history' is str, not a list of turns"),
        ({"history": [["A?"]], "instruction": "Hello?", "output": "Hi!"}, "x:1 history 1: expected a question and its answer"),
        ({"history": [["A?", " "]], "instruction": "Hello?", "output": "Hi!"}, "x:1 history 1: field 'content' is blank"),
        ({"messages": CHAT, "images": ["a.png"]}, "field 'images' holds what is no text"),
        ({"messages": [{**ASK, "image": "a.png"}, CHAT[1]]}, "message 1: field 'image' holds what is no text"),
        ({"messages": [{**ASK, "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, CHAT[1]]}, "message 1 part 1"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}, CHAT[1]]}, "part 1 is of type 'video'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}, CHAT[1]]}, "part 1: field 'text' is NoneType, not text"),
        ({"messages": [{"role": "user", "content": [7]}, CHAT[1]]}, "part 1: expected an object, found int"),
        ({"messages": [{"role": "user", "content": []}, CHAT[1]]}, "message 1: field 'content' is blank"),
        ({"messages": [{"role": "user", "content": float("nan")}, CHAT[1]]}, "field 'content' is nan, which is a missing value"),
        ({"prompt": "Hello?", "response": float("inf")}, "field 'response' is inf, which is no number"),
        ({"messages": [ASK, {**CHAT[1], "weight": 0.5}]}, "message 2: weight is 0.5; only 1 or true"),
        ({"messages": [ASK, {**CHAT[1], "train_detail": [{"begin_offset": 0}]}]}, "train_detail asks for loss on parts"),
        ({"messages": [ASK, {**CHAT[1], "train": "no"}]}, "message 2: train is 'no'; only 1 or true"),
        ({"messages": [ASK, {**CHAT[1], "weight": 0, "train": True}]}, "weight and train contradict each other"),
        ({"messages": [{**ASK, "train": True}, CHAT[1]]}, "message 1: train asks to train on a message of user"),
        ({"messages": CHAT, "weight": 0.3}, "x:1: weight is 0.3"),
        ({"messages": CHAT, "loss_mask": [0, 1, 1]}, "loss_mask has 3 entries for 2 messages"),
        ({"messages": CHAT, "loss_mask": [1, 1]}, "x:1 message 1: loss_mask asks to train on a message of user"),
        ({"messages": CHAT, "thinking": True}, "field 'thinking' is True; it may hold the reasoning"),
        ({"messages": [{**ASK, "thinking": "Hm."}, CHAT[1]]}, "message 1: reasoning in a message of 'user'"),
        ({"messages": [ASK, {**CHAT[1], "thinking": "A", "reasoning": "B"}]}, "hold different reasonings"),
        ({"messages": [ASK, {"role": "assistant", "content": "<think>A</think>B", "thinking": "C"}]}, "and the two differ"),
        ({"messages": [ASK, {**CHAT[1], "tool_calls": [{"function": {"arguments": "{}"}}]}]}, "no object with the name of"),
        ({"messages": [ASK, {**CHAT[1], "tool_calls": "add(1)"}]}, "tool_calls is a text that is no JSON"),
        ({"messages": [{**ASK, "tool_calls": [CALL]}, CHAT[1]]}, "message 1: tool calls in a message of 'user'"),
    ],
)  # fmt: skip
def test_what_is_not_used_is_refused_on_one_line(record, says):
    with pytest.raises(DataError) as caught:
        read_conversation(record, "x:1")
    assert says in str(caught.value) and str(caught.value).startswith("x:1") and "\n" not in str(caught.value)


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"a": {"type": "number", "default": None}}}}


@pytest.mark.parametrize(
    ("record", "tools"),
    [
        ({}, None), ({"tools": None}, None), ({"tools": []}, None), ({"tools": " "}, None), ({"tools": "[]"}, None),
        ({"tools": float("nan")}, None), ({"tools": [TOOL]}, [TOOL]), ({"tools": json.dumps([TOOL])}, [TOOL]),
        ({"tools": [{**TOOL, "strict": None}]}, [TOOL]), ({"functions": [TOOL["function"]]}, [TOOL]),
    ],
)  # fmt: skip
def test_tools_of_a_record(record, tools):
    assert read_tools(record, "x:1") == (json.dumps(tools) if tools else "")


@pytest.mark.parametrize("tools", ["add", {"name": "add"}, ["add"], 7])
def test_tools_that_are_none_are_refused(tools):
    with pytest.raises(DataError, match="x:1: (field 'tools' is no list of tools|tools is a text that is no JSON)"):
        read_tools({"tools": tools}, "x:1")


def test_union_nulls_of_a_table_are_missing_values(tmp_path):
    """A table has one set of keys for all messages, and fills those that one does not have with null."""
    import datasets

    called = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2", "name": "add"},
        CHAT[1],
    ]
    rows = [
        {"messages": called, "tools": [TOOL]},
        {"messages": [*CHAT[:1], {**CHAT[1], "reasoning_content": "Well.", "weight": 1}]},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    table.to_json(tmp_path / "rows.jsonl")
    assert "null" in (tmp_path / "rows.jsonl").read_text()
    for name in ("rows.parquet", "rows.jsonl"):
        records = [record for _, record in read_records(tmp_path / name)]
        assert [read_conversation(record, "x:1") for record in records] == [
            [HELLO[0], Message("assistant", "", tool_calls=CALLS), Message("tool", "2", name="add"), HELLO[1]],
            [HELLO[0], Message("assistant", "<think>\nWell.\n</think>\n\nHi!")],
        ]
        assert json.loads(read_tools(records[0], "x:1"))[0]["function"]["name"] == "add" and read_tools(records[1], "x:1") == ""


def test_published_files_are_read_whole():
    turns = {}
    for name in ("chat/alpaca_en_demo.json", "chat/identity.json", "preference/dpo_en_demo.json", "preference/dpo_zh_demo.json"):
        conversations = [read_conversation(record, where) for where, record in read_records(public_file(name))]
        turns[name] = (len(conversations), max(map(len, conversations)))
    assert list(turns.values()) == [(999, 2), (91, 2), (300, 14), (300, 3)]
    blank = []
    for where, record in read_records(public_file("preference/hh_harmless.jsonl.gz")):
        try:
            read_conversation(record, where)
        except DataError as error:
            blank.append(str(error))
    assert len(blank) == 4 and all("field 'Assistant' is blank" in line for line in blank)
